"""OpenAI's fine-tuning API on the server's training engine: files, jobs, and models to chat with.

docs/fine-tuning-api.md is the guide.
"""
