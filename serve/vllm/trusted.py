"""Code of a checkpoint beside the server: the files that --trust-remote-code runs, and a script that never runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import UserError
from ...load import code_of


def trusted_code(args: Any, model: str) -> list[str]:
    """A line with the files of `model` and of its tokenizer that run with --trust-remote-code; none without it.

    Raises UserError for a tokenizer that is no directory: the hub's files could not be read before they run.
    """
    if not args.trust_remote_code:
        return []
    if args.tokenizer and not Path(args.tokenizer).is_dir():
        raise UserError(
            f"--trust-remote-code runs files of directories, and --tokenizer {args.tokenizer} is none: download it by "
            f"`hf download {args.tokenizer} --local-dir DIR`, read its files, and name DIR"
        )
    folders = dict.fromkeys(map(Path, (model, args.tokenizer or model)))
    files = [file for folder in folders for file in code_of(folder)]
    return [f"--trust-remote-code: {', '.join(files)} will run" if files else "--trust-remote-code: no file to run"]


def without_model_script() -> None:
    """Keep vLLM's application from running model.py of /opt/ml/model, or of $SAGEMAKER_MODEL_PATH.

    vLLM makes every application ready for SageMaker, whose loader runs that file. The loader is made here, once, for a
    file that cannot be; its class keeps it.
    """
    try:
        from model_hosting_container_standards.common.custom_code_ref_resolver.function_loader import FunctionLoader
        from model_hosting_container_standards.sagemaker.sagemaker_loader import SageMakerFunctionLoader
    except ModuleNotFoundError:  # a release of vLLM without it
        return
    SageMakerFunctionLoader._default_function_loader = FunctionLoader([], {"model": "/dev/null/model.py"})
