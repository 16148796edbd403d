"""A model hub: promoted releases are pushed to a repository of it, a branch a form, by commit.

Credentials are `HF_TOKEN`, the address `HF_ENDPOINT`, both of the environment. huggingface_hub does
the work: large files are sent first and found again by their SHA-256, so that a push which was cut
goes on with what is missing; one commit then names them all, so that nobody sees half a release.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from infra.errors import one_line
from infra.outgoing import files_to_send

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

_MAIN = "main"  # exists as soon as a repository does
_ITS_OWN = ".gitattributes"  # the hub's file: which files are large


class HubError(RuntimeError):
    """A hub that does not take a release, with the way out."""


@dataclass(frozen=True)
class HubRepository:
    """A repository of models. private: what it is made as; one that is there must be it, too."""

    repo: str
    private: bool = True

    def check(self) -> None:
        """Whether it could be pushed to, as far as that is known without writing.

        Raises:
            HubError: a name that no hub takes, no token or one that only reads, a public
                repository where a private one is asked for, or no answer.
        """
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(self.repo)
        except HFValidationError as error:
            raise HubError(f"registry.hub.repo: {one_line(error)}: rename it") from error
        if "/" not in self.repo:
            raise HubError(f"registry.hub.repo: {self.repo}: write namespace/name")
        if not os.environ.get("HF_TOKEN"):
            raise HubError(
                f"registry.hub: {self.repo} is pushed to with HF_TOKEN, which is not set: set it to"
                " a token that may write, or leave registry.hub out"
            )
        with self._told():
            about = self._api.whoami()
            role = ((about.get("auth") or {}).get("accessToken") or {}).get("role")
            if role == "read":
                raise HubError(
                    f"registry.hub: HF_TOKEN of {about.get('name')} only reads: set one that may"
                    f" write to {self.repo}"
                )
            self._check_hidden()

    def push(
        self, folder: Path, branch: str, message: str, instead: Mapping[str, bytes] | None = None
    ) -> str:
        """Make a folder all that a branch holds; returns the address of its commit. What the hub
        has already is not sent again, and where nothing changed there is no new commit.

        instead: contents by name, in place of the folder's files. Hidden files are left out.

        Raises:
            HubError: it takes none of it, or only a part that no commit names.
        """
        with self._told():
            api = self._api
            api.create_repo(self.repo, private=self.private, exist_ok=True)
            self._check_hidden()
            if branch != _MAIN:
                api.create_branch(self.repo, branch=branch, exist_ok=True)
            there = api.list_repo_files(self.repo, revision=branch)
            commit = api.create_commit(
                self.repo,
                _operations(folder, instead or {}, there),
                commit_message=message,
                revision=branch,
            )
        return str(commit.commit_url)

    @property
    def _api(self) -> "HfApi":
        from huggingface_hub import HfApi  # imported late: slow, and seldom needed

        return HfApi(token=os.environ.get("HF_TOKEN"), library_name="dpq")

    def _check_hidden(self) -> None:
        """A repository that is there is private where that is asked for."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            public = not self._api.model_info(self.repo).private
        except RepositoryNotFoundError:
            return
        if self.private and public:
            raise HubError(
                f"registry.hub: {self.repo} is public, and registry.hub.private is true: set it to"
                " false, make the repository private on the hub, or name another"
            )

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Errors of the hub and of the way to it as ours."""
        import httpx
        from huggingface_hub.errors import HfHubHTTPError

        try:
            yield
        except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
            if isinstance(error, HubError):
                raise
            why = one_line(error, 300)
            if isinstance(error, RuntimeError) and error.__cause__:  # "while uploading …", and why
                why = f"{why} {one_line(error.__cause__, 300)}"
            raise HubError(f"{self.repo}: the hub at {self._api.endpoint}: {why}") from error


def _operations(
    folder: Path, instead: Mapping[str, bytes], there: list[str]
) -> "list[CommitOperationAdd | CommitOperationDelete]":
    """What makes a branch that holds `there` hold the folder."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    contents: dict[str, Path | bytes] = {**files_to_send(folder), **instead}
    gone = [name for name in there if name not in contents and name != _ITS_OWN]
    return [
        *(CommitOperationAdd(name, content) for name, content in contents.items()),
        *(CommitOperationDelete(name, is_folder=False) for name in gone),
    ]
