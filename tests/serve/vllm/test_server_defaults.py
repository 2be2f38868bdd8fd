"""Defaults of a model's config, in a real server."""

from __future__ import annotations

import importlib.util
import json
import urllib.error
import urllib.request
from typing import Any

import pytest

from loopwise.serve import Engine, Params
from tests.helpers.serve_tiny import GROUPED, RETROFIT, prompts, save, source_config
from tests.helpers.serving import serving

pytestmark = [
    pytest.mark.xdist_group("vllm"),  # one engine at a time
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.mark.slow
def test_a_default_min_recurrences_above_the_requests_depth(tmp_path):
    """It counts as that depth, as in the offline engine; a request that gives both is refused."""
    folder, prompt = tmp_path / "tiny", prompts()[1]
    exit = {"rule": "latent-diff", "threshold": 10.0, "min_recurrences": 4}
    save(folder, source_config("llama", **GROUPED), **RETROFIT, num_recurrences=4, exit=exit)
    engine = Engine(folder, max_num_seqs=1, max_model_len=64, dtype="float32")
    with serving(folder) as server:

        def post(**fields) -> dict:
            body = {"prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
            body |= {"model": "tiny", "return_recurrences": True, **fields}
            headers = {"Content-Type": "application/json"}
            call = urllib.request.Request(server.url + "/v1/completions", json.dumps(body).encode(), headers)
            return json.load(urllib.request.urlopen(call, timeout=60))

        cases: list[dict[str, Any]] = [{}, {"num_recurrences": 2}, {"num_recurrences": 3}]
        for given in cases:
            (done,) = engine.generate([prompt], Params(6, ignore_eos=True, **given))
            reply = post(**given)
            assert reply["usage"]["recurrences"]["per_token"] == [done.depths], given
            assert reply["choices"][0]["token_ids"] == done.tokens
            assert done.depths == [given.get("num_recurrences", 4)] * 6
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(num_recurrences=2, min_recurrences=3)
        assert caught.value.code == 400
        error = json.load(caught.value)["error"]
        assert error["param"] == "min_recurrences"
        assert "min_recurrences=3: at most num_recurrences, which is 2" in error["message"]
