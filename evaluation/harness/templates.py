"""Templates of tasks and of conversations: programs of their authors, in a sandbox and within limits."""

from __future__ import annotations

from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval import utils

from ...bounded import bounded, check_text
from ...errors import UserError, reason, shorten

CHAT, TASK = "the chat template", "a template of the task"


def sandbox_tasks() -> None:
    """Let lm-eval render the templates of tasks in Jinja's sandbox, and within the limits of chat templates."""
    if isinstance(utils.env, ImmutableSandboxedEnvironment):
        return
    own = utils.env
    utils.env = ImmutableSandboxedEnvironment(undefined=own.undefined, keep_trailing_newline=own.keep_trailing_newline)
    utils.env.filters.update(own.filters)
    utils.apply_template = apply_template


def apply_template(template: str, doc: dict[str, Any]) -> str:
    """The text of `template` for the record `doc`, in place of lm-eval's function of this name.

    Raises UserError for a template that reaches for Python's own objects, fails, or goes beyond its limits.
    """
    try:
        with bounded(TASK):
            text = utils.env.from_string(template).render(**doc)
    except UserError:
        raise
    except Exception as error:  # a template is a program, which may raise any error
        raise UserError(f"{TASK} refuses a question ({shorten(reason(error), 200)})") from None
    return check_text(TASK, text)


class ChatTemplates:
    """Beside a class of lm-eval's models: its chat template within limits."""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation. Raises UserError where the template refuses it, or goes beyond its limits."""
        above: Any = super()
        try:
            with bounded(CHAT):
                text = above.apply_chat_template(chat_history, add_generation_prompt)
        except UserError:
            raise
        except Exception as error:  # a template is a program, which may raise any error
            raise UserError(f"{CHAT} refuses a question ({shorten(reason(error), 200)})") from None
        return check_text(CHAT, text)
