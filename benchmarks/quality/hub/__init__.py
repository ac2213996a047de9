"""The same benchmark on any model and data set, from a configuration: a hub or local model, a hub data set or local files.

    python -m benchmarks.quality run --config benchmarks/quality/configs/glue.yaml --task cola --method road_1 --device cuda
    python -m benchmarks.quality report --records FOLDER

`settings.py` says what a configuration holds; docs/quality-hub.md how to run one.
"""
