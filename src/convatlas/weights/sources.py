"""Where checkpoints come from: a path, the Hugging Face hub (``hf://``) or the web (``https://``)."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterable
from contextlib import suppress
from http.client import HTTPException, HTTPMessage
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import SplitResult, unquote, urlsplit

from convatlas.errors import CheckpointError
from convatlas.files import atomic_path

__all__ = ["WEIGHT_SUFFIXES", "locate"]

#: Suffixes of files that may hold weights.
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl", ".npz", ".h5", ".hdf5")

_HUB = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<file>.+))?")
_TIMEOUT = 30  # seconds without a byte
_CHUNK = 1 << 20


def locate(source: str | os.PathLike[str]) -> Path:
    """The local file of a source; downloads it first if it is not in the cache.

    Args:
        source: a path; ``hf://owner/name[@revision][/file]``, where a repository without a file name must have
            ``model.safetensors``, ``pytorch_model.bin`` or one weight file only; or ``https://...`` (``http://`` is
            read from this machine only). ``#sha256=...``, the whole hash or its beginning, may be added to both.

    Raises:
        CheckpointError: there is no such file, or it cannot be fetched or differs from its hash.
    """
    text = os.fspath(source)
    if "://" not in text:
        return _local_file(Path(text).expanduser())
    address, _, fragment = text.partition("#")
    expected = re.fullmatch(r"sha256=([0-9a-fA-F]{8,64})", fragment)
    if fragment and expected is None:
        raise CheckpointError(f"{text}: expected #sha256= and 8 to 64 hexadecimal digits")
    if address.startswith("hf://"):
        path = _from_hub(address)
    elif re.match(r"https?://", address):
        path = _from_web(address)
    else:
        raise CheckpointError(f"{text}: a source is a path, hf://owner/name or https://..., nothing else")
    if expected is not None:
        with open(path, "rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if not actual.startswith(expected[1].lower()):
            path.unlink()
            raise CheckpointError(f"{path.name}: its sha256 is {actual}, not {expected[1]}; the file was removed")
    return path


def _local_file(path: Path) -> Path:
    try:
        if path.is_dir():
            files = sorted(entry.name for entry in path.iterdir() if entry.suffix in WEIGHT_SUFFIXES)
            hint = f"; it holds {', '.join(files[:5])}" if files else ""
            raise CheckpointError(f"{path} is a folder; give the checkpoint file{hint}")
        if not path.exists():
            raise CheckpointError(f"{path} does not exist")
        if not path.is_file():
            raise CheckpointError(f"{path} is no regular file")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return path


def _from_hub(source: str) -> Path:
    from huggingface_hub import errors, hf_hub_download

    match = _HUB.fullmatch(source)
    if match is None:
        raise CheckpointError(f"{source}: expected hf://owner/name[@revision][/file]")
    repo, revision = match["repo"], unquote(match["revision"]) if match["revision"] else None
    try:
        name = match["file"] or _choose(source, _hub_files(repo, revision))
        return Path(hf_hub_download(repo, name, revision=revision))
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{source}: access needs an agreement; accept it on the repository's page") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"{source}: the hub has no such repository, or it is private (hf auth login)") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{source}: the repository has no revision {revision}") from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(f"{source}: not in the local cache, and the hub cannot be reached") from error
    except errors.EntryNotFoundError as error:
        raise CheckpointError(f"{source}: the repository has no file {match['file']}") from error
    except (errors.HFValidationError, errors.HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{source} cannot be fetched: {str(error).strip().splitlines()[0]}") from error


def _hub_files(repo: str, revision: str | None) -> list[str]:
    from huggingface_hub import HfApi, errors, snapshot_download

    refusals = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError)
    try:
        return HfApi().list_repo_files(repo, revision=revision)
    except refusals:
        raise
    except Exception:  # no network, in the words of whatever HTTP library the hub's client uses
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _choose(source: str, names: Iterable[str]) -> str:
    weights = sorted(name for name in names if PurePosixPath(name).suffix in WEIGHT_SUFFIXES)
    for usual in ("model.safetensors", "pytorch_model.bin"):
        if usual in weights:
            return usual
    if len(weights) != 1:
        found = f"has several weight files ({', '.join(weights[:5])})" if weights else "has no weight file"
        raise CheckpointError(f"{source} {found}; name one: hf://owner/name/file")
    return weights[0]


def _from_web(address: str) -> Path:
    import torch.hub

    try:
        url = urlsplit(address)
        _ = url.port
    except ValueError as error:
        raise CheckpointError(f"{address} is no address: {error}") from error
    _check_scheme(url)
    name = re.sub(r"[^\w.+-]", "_", unquote(PurePosixPath(url.path).name)) or "weights"
    # Many files are called model.pth: the address itself tells them apart.
    digest = hashlib.sha256(address.encode()).hexdigest()[:12]
    target = Path(torch.hub.get_dir()) / "checkpoints" / f"{digest}-{name}"
    if not target.is_file():
        _download(url, target)
    return target


def _download(url: SplitResult, target: Path) -> None:
    handlers: list[Any] = [_SafeRedirects()]
    if _is_loopback(url):
        handlers.append(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url.geturl(), headers={"User-Agent": "convatlas"})
    shown = _shown(url)
    try:
        with (
            urllib.request.build_opener(*handlers).open(request, timeout=_TIMEOUT) as answer,
            atomic_path(target) as part,
            open(part, "wb") as file,
        ):
            length = answer.headers.get("Content-Length")
            total = int(length) if length and length.isdigit() else None
            received = _copy(answer, file, total, target.name)
            if total is not None and received != total:
                raise CheckpointError(f"{shown}: the download broke off after {received} of {total} bytes")
    except urllib.error.HTTPError as error:
        raise CheckpointError(f"{shown}: the server answers {error.code} ({error.reason})") from error
    except urllib.error.URLError as error:
        raise CheckpointError(f"{shown} cannot be reached: {error.reason}") from error
    except (TimeoutError, ConnectionError, HTTPException, ssl.SSLError) as error:
        raise CheckpointError(f"{shown}: the download broke off ({error or type(error).__name__})") from error


def _copy(answer: Any, file: IO[bytes], total: int | None, name: str) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    received = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=total)
        while chunk := answer.read(_CHUNK):
            file.write(chunk)
            received += len(chunk)
            progress.update(task, completed=received)
    return received


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from the web to plain http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        _check_scheme(urlsplit(newurl))
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_scheme(url: SplitResult) -> None:
    if url.scheme != "https" and not (url.scheme == "http" and _is_loopback(url)):
        raise CheckpointError(f"{_shown(url)}: only https:// is read from the web; http:// can be tampered with")


def _is_loopback(url: SplitResult) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(url.hostname or "").is_loopback
    return url.hostname == "localhost"


def _shown(url: SplitResult) -> str:
    """The address without name, password and query, which may be secret."""
    port = f":{url.port}" if url.port else ""
    return f"{url.scheme}://{url.hostname}{port}{url.path}"
