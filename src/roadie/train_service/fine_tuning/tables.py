"""What fine-tuning remembers: files, jobs, what happened to jobs, and the models that they made."""

from __future__ import annotations

from roadie.train_service.database import Part

PART = Part(
    "fine_tuning",
    1,
    """
CREATE TABLE IF NOT EXISTS files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, filename TEXT NOT NULL,
    bytes INTEGER NOT NULL, purpose TEXT NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER);
CREATE INDEX IF NOT EXISTS files_of_tenants ON files (tenant, number);
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, status TEXT NOT NULL,
    created_at INTEGER NOT NULL, finished_at INTEGER, model TEXT NOT NULL, training_file TEXT NOT NULL, validation_file TEXT,
    method TEXT NOT NULL, hyperparameters TEXT NOT NULL, seed INTEGER NOT NULL, suffix TEXT, metadata TEXT,
    is_validated INTEGER NOT NULL DEFAULT 0, error TEXT, fine_tuned_model TEXT, trained_tokens INTEGER, result_file TEXT);
CREATE INDEX IF NOT EXISTS jobs_of_tenants ON jobs (tenant, number);
CREATE INDEX IF NOT EXISTS jobs_by_status ON jobs (status, number);
CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, created_at INTEGER NOT NULL, level TEXT NOT NULL,
    message TEXT NOT NULL, step INTEGER, data TEXT);
CREATE INDEX IF NOT EXISTS events_of_jobs ON events (job, number);
CREATE TABLE IF NOT EXISTS models (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, name TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL,
    job TEXT NOT NULL, step INTEGER NOT NULL, folder TEXT NOT NULL, created_at INTEGER NOT NULL, metrics TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS models_of_jobs ON models (job, number)
""",
)
