"""Tinker's API on the server's engine: the official SDK trains and samples with base_url and key, and nothing else.

routes      what is asked by HTTP, in the SDK's own types          wire       protobuf to rows, results to protobuf
runs        a tenant's requests, in the order of seq_id            presets    LoRA's rank as settings of RoAd
futures     what was asked, and its result                         records    sessions, runs, checkpoints, samplers in SQLite
samplers    weights to sample from, and samples                    store      folders of weights
"""

from __future__ import annotations

from roadie.extras import need

need("train-service")
