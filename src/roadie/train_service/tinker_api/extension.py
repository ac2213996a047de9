"""Tinker's API as an extension of the server."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter

from roadie.serving.http.extensions import Extension
from roadie.serving.http.launch import Ground
from roadie.train_service.database import Database
from roadie.train_service.progress import Progress
from roadie.train_service.tinker_api import lists, routes
from roadie.train_service.tinker_api.samplers import owner_of
from roadie.train_service.tinker_api.service import BaseModel, TinkerService


def extension(ground: Ground, database: Database, folder: Path, progress: Progress) -> Extension:
    """folder: of weights; progress: told how runs go on."""
    base = BaseModel(ground.model, ground.names, ground.names[-1])
    service = TinkerService(ground.engine, base, database, folder, progress)
    router = APIRouter()
    for part in (routes, lists):
        router.include_router(part.make_router(service))
    return Extension(router, {**routes.ROUTES, **lists.ROUTES}, owner_of, service.start, service.stop)
