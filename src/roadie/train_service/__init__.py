"""The training service: tenants train and sample on one base model, by the clients they already have.

`roadie serve --train` runs it. docs/train-service.md is the guide.
"""
