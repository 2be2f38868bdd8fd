"""What a serving recipe may say. Everything else about the server is a vLLM flag."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..recipe import Count, Integer, Section


class ServeRecipe(Section):
    num_recurrences: Count | None = Field(None, description="depth of every request; default the model's own")
    engine: Literal["lanes", "fixed"] = Field(
        "fixed", description="lanes: requests at their own depths share every core pass; fixed: all run at one depth"
    )
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: Integer = Field(8000, ge=1, le=65535, description="port to listen on")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of weights and cache; auto: the checkpoint's, but bfloat16 for float32"
    )
    name: str | None = Field(None, description="model name in the API; default the directory's name")
    drain_seconds: Integer = Field(30, ge=0, description="time that open requests get after SIGTERM or Ctrl-C")
