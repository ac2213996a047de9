"""Putting a finished adapter on the hub; whether that will be possible is asked before anything is trained."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from roadie.errors import ConfigError, RoadieError

logger = logging.getLogger("roadie")


@dataclass(frozen=True)
class HubPlace:
    """A repository of the hub, "owner/name"; private: where it is made anew."""

    repository: str
    private: bool = True

    def prepare(self) -> None:
        """Make the repository where there is none; raises `ConfigError` where it cannot be written to.

        Making it is the one question that asks for everything that an upload needs: network, token, and the right to write.
        """
        import huggingface_hub

        try:
            huggingface_hub.HfApi().create_repo(self.repository, private=self.private, exist_ok=True)
        except Exception as error:  # the network, the name, the token: each raises of its own kind
            raise ConfigError(
                f"got push_to_hub={self.repository!r}; wanted a repository that can be written to, before anything is trained; "
                "log in (hf auth login) and check name and network, or leave it out. "
                f"huggingface_hub says: {_one_line(error)}"
            ) from error

    def push(self, folder: Path) -> str:
        """Upload the files of a folder; gives the address. Raises `RoadieError`, with the way to do it later."""
        import huggingface_hub

        try:
            huggingface_hub.HfApi().upload_folder(
                repo_id=self.repository, folder_path=folder, commit_message="Add a RoAd adapter"
            )
        except Exception as error:  # the network and the hub raise many kinds; the adapter is safe in its folder
            raise RoadieError(
                f"{folder}: the adapter is complete here, but could not be uploaded to {self.repository} "
                f"({type(error).__name__}: {_one_line(error)}); run: hf upload {self.repository} {folder}"
            ) from error
        return f"https://huggingface.co/{self.repository}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
