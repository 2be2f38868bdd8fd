"""Requests and models as every engine sees them: which fields a request has, what a model offers. No vLLM in here.

`validate_*` raises FieldError for a request, `check_*` UserError for a model or a setting. In reading order:

    architectures.py      source architectures that can be served
    generation_config.py  sampling defaults and stop tokens of generation_config.json
    echo.py               values of requests, cut short for messages
    fields.py             names of request fields, read from a request's body
    decoders.py           how positions are decoded: plain, wave, diffusion
    depth.py              a request's depth: its fields, then the model's defaults
    lanes.py              settings of the lane engine inside vLLM
    prompt_budget.py      prompt tokens of a step, in tokens x depth
    limits.py             models that can be served, and what their requests may ask
    validation.py         the values of request fields, against those limits
"""
