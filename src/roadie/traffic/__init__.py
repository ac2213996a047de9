"""Traffic of many adapters for a server: what guidellm, which makes and measures it, does not have.

Popularity(("legal", "terse"), skew=1.0).of(prompt)     which adapter a request is of
drive(Traffic(url, popularity), [...])                  guidellm, each of whose requests asks for an adapter of its own
by_model(report)                                        how each adapter fared, and how fairly they were served
"""

from __future__ import annotations

from roadie.traffic.models import Popularity, models_of
from roadie.traffic.report import Fared, Found, by_model
from roadie.traffic.run import Traffic, drive

__all__ = ["Fared", "Found", "Popularity", "Traffic", "by_model", "drive", "models_of"]
