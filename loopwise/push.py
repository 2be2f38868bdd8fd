"""`--push-to-hub NAME` of convert, train and export: a finished OUT, uploaded to the Hugging Face hub.

The name, the token and the place on the hub are checked before any work; nothing is made there before OUT is whole.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .card import CARD, read_metadata, with_metadata
from .checkpoint import weight_files
from .directory import RECORD, changed_weights, is_whole, new_file, record_of
from .errors import UserError
from .hub import asking, is_valid_id, why_not
from .model_index import model_index, read_results
from .version import __version__

MODEL_FILES = ("config.json", "adapter_config.json")  # by which a repository holds a model, beside its weights


@dataclass(frozen=True)
class Target:
    """A repository to push to, as it was when the command began.

    name: OWNER/NAME.   private: it is, or will be.   results: of `loopwise eval`, for the card.
    """

    name: str
    private: bool
    results: list[dict[str, Any]]

    def __str__(self) -> str:
        return f"{self.name} ({'private' if self.private else 'public'})"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --push-to-hub and what belongs to it."""
    parser.add_argument(
        "--push-to-hub",
        metavar="NAME",
        help="upload OUT, once it is whole, to the hub as OWNER/NAME, or NAME for your own; private. The same command "
        "again uploads what is missing, and makes nothing anew",
    )
    parser.add_argument("--public", action="store_true", help="with --push-to-hub: make the repository public")
    parser.add_argument(
        "--metrics",
        metavar="FILE",
        action="append",
        default=[],
        help="with --push-to-hub: a result of loopwise eval OUT --out FILE, for the card; may be given several times",
    )


def check_target(args: argparse.Namespace, source: str, out: Path) -> Target | None:
    """The repository that the options of `add_options` name for `out`, made from `source`; None without --push-to-hub.

    Asks the hub, and changes nothing there. Raises UserError, before any work: for a wrong name, without a token that
    writes, for an owner that is neither the user nor one of its organisations, for a hub that cannot be asked, for a
    public repository without --public, for one with a model that Loopwise did not push, for the `source` itself, and
    for results that are not of `out`.
    """
    if args.push_to_hub is None:
        for option, value in (("--public", args.public), ("--metrics", args.metrics)):
            if value:
                raise UserError(f"{option} belongs to --push-to-hub NAME")
        return None
    from huggingface_hub import HfApi

    name, option = args.push_to_hub, f"--push-to-hub {args.push_to_hub}"
    if not is_valid_id(name):
        raise UserError(f"{option}: NAME or OWNER/NAME, of letters, digits, '-', '_' and '.'")
    api = HfApi()
    with asking(lambda error: UserError(f"{option}: {why_not(error)}")):
        user = api.whoami()
        role = user.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise UserError(f"{option}: the token can only read; log in with one that writes")
        name = name if "/" in name else f"{user['name']}/{name}"
        if source.partition(":")[0].casefold() == name.casefold() and not Path(source).exists():  # ID, or ID:FILE.gguf
            raise UserError(f"{option}: {name} is the source itself, which the push would replace; choose another name")
        owners = [user["name"], *(group["name"] for group in user.get("orgs", []))]
        listed = name.partition("/")[0].casefold() in map(str.casefold, owners)
        if not listed and role != "fineGrained":  # whose rights may reach beyond the organisations listed here
            raise UserError(f"{option}: the token may not write there; as owner give {' or '.join(owners)}")
        _is_there(api, name, not args.public, option)
    return Target(name, not args.public, _results(args, out, name))


def _is_there(api: Any, name: str, private: bool, option: str) -> bool:
    """True for a repository `name` that may be pushed to, False where there is none.

    Raises UserError for one that is not as `private` as asked for, and for one with a model that Loopwise did not push;
    the hub's errors for any other, as one that is gated.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        info = api.model_info(name)
    except GatedRepoError:  # a kind of the next one
        raise
    except RepositoryNotFoundError:
        return False
    if private and not info.private:
        raise UserError(f"{option}: {name} is public already; give --public to push there")
    if info.private and not private:
        raise UserError(
            f"{option}: {name} is private; make it public in its settings on the hub, or leave --public out"
        )
    files = [file.rfilename for file in info.siblings or []]
    if theirs := _foreign_model(files, _pushed(api, name, files)):
        raise UserError(f"{option}: {name} holds a model that Loopwise did not push ({theirs}); choose another name")
    return True


def push(target: Target, out: Path) -> None:
    """Upload the files that Loopwise wrote into `out`, which is whole, and print the commit.

    Makes the repository if it is not there, and checks it again: hours may have passed, and an organisation may have
    rules for new ones. Files of others in it stay; those that an earlier push put there and `out` lacks are removed, as
    they would be loaded. What the hub has already is not sent again. With results, the card in `out` gets them first.
    Raises UserError where the hub refuses, for code in `out` that is not Loopwise's own, and for weights that are not
    as they were written, which the card calls verified.
    """
    record = record_of(out)
    files = {*map(str, record["files"]), RECORD}
    _check_code(out, files, record)
    weight_files(out)
    if name := changed_weights(out, thorough=True):
        raise UserError(f"{out / name} is not as Loopwise wrote it; only that is pushed, and --force makes OUT anew")
    if target.results:
        _add_results(out / CARD, target)
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    api, option = HfApi(), f"--push-to-hub {target.name}"

    def refusal(error: Exception) -> UserError:
        again = "the same command uploads what is missing"
        if "Invalid metadata" in str(error):  # the client's words for what the hub refuses in a card
            again = f"mend the metadata at the top of {out / CARD}, then {again}"
        return UserError(f"{option}: {why_not(error)}. OUT is whole: {again}")

    with asking(refusal):
        if not _is_there(api, target.name, target.private, option):
            api.create_repo(target.name, private=target.private)
            _is_there(api, target.name, target.private, option)
        stale = _pushed(api, target.name, api.list_repo_files(target.name)) - files
        done = api.upload_folder(
            repo_id=target.name,
            folder_path=out,
            allow_patterns=[glob.escape(name) for name in sorted(files)],
            delete_patterns=[glob.escape(name) for name in sorted(stale)] or None,
            commit_message=f"Upload by loopwise {__version__}",
        )
    print(f"pushed: {target}, revision {done.oid}", flush=True)


def _results(args: argparse.Namespace, out: Path, name: str) -> list[dict[str, Any]]:
    """The results in the files of --metrics. Raises UserError for those that are not of `out` as it is."""
    found = []
    for text in args.metrics:
        file = Path(text).expanduser()
        result = read_results(file)
        model = result.get("model_path") or result["model"]  # earlier releases have no path
        if model != name and Path(model).expanduser().resolve() != out.resolve():
            raise UserError(f"--metrics {text}: it measured {model}, not {out}")
        if args.force or not is_whole(out) or file.stat().st_mtime < (out / RECORD).stat().st_mtime:
            raise UserError(
                f"--metrics {text}: it measured another {out} than will be pushed; push, measure, and push again"
            )
        found.append(result)
    return found


def _add_results(card: Path, target: Target) -> None:
    """Put the results into the metadata of the file `card`, in place of earlier ones."""
    fields = {**read_metadata(card), "model-index": model_index(target.name.partition("/")[2], target.results)}
    text = with_metadata(card.read_text(encoding="utf-8"), fields)
    with new_file(card) as partial:
        partial.write_text(text, encoding="utf-8")


def _pushed(api: Any, name: str, files: list[str]) -> set[str]:
    """Those of the `files` in repository `name` that Loopwise pushed, by the record among them."""
    if RECORD not in files:
        return set()
    record = record_of(Path(api.hf_hub_download(name, RECORD)).parent)
    listed = record.get("files")
    return {RECORD, *(map(str, listed) if isinstance(listed, list) else ())} & {*files}


def _foreign_model(files: list[str], pushed: set[str]) -> str | None:
    """The first of `files` at the top of a repository that belongs to a model, and is not among the `pushed` ones."""
    found = (
        name
        for name in sorted(files)
        if "/" not in name
        and name not in pushed
        and (name in MODEL_FILES or name.endswith((".safetensors", ".safetensors.index.json", ".bin")))
    )
    return next(found, None)


def _check_code(out: Path, files: set[str], record: dict[str, Any]) -> None:
    """Raises UserError for a Python file of `out` that is not as Loopwise wrote it."""
    code = record.get("code")
    known = code if isinstance(code, dict) else {}
    for name in sorted(name for name in files if name.endswith(".py")):
        digest = ""
        with suppress(OSError):
            digest = hashlib.sha256((out / name).read_bytes()).hexdigest()
        if known.get(name) != digest:
            raise UserError(f"{out / name} is not the code that Loopwise wrote there; only that is pushed")
