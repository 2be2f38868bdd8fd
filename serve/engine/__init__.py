"""The depth-wise engine: positions at mixed depths through one core. Nothing here imports vLLM.

A *lane* is a position of a request in flight: row, position, depth, state. A *pass* runs the core once over many
lanes, whatever their depth. A lane that *exits* is *read out* by coda and head; its token is put out, and the next
position starts at depth 0. Prompt tokens are lanes, too. A *tick* is one or more passes, the read-out of the lanes that
left, and the start of the positions after them. A *step* is a number of ticks, after which the caller sees the tokens.

    +-> choose -> enter -> recur (one or more passes) -> settle -+-> fetch -> read out -> sample -> emit -> start -+
    |                                                            |                                                |
    +------------------------- lanes that run on ----------------+----------------- next positions --------------+

The core path, read in half an hour: request.py, kv.py, state.py, forward.py, exits.py, transitions/steps.py,
transitions/requests.py, tick.py, eager_tick.py, loop.py. The others are chapters. All files in reading order; each
imports only files above it:

    diffusion_settings.py  settings of the decoder diffusion
    request.py             the settings of one request
    kv.py                  KV policies: slots of a recurrence
    loop_config.py         sizes of a loop
    state.py               every dense tensor: requests by row, lanes by number
    attention/             attention over a paged cache
    parts.py               the protocol of a model in pieces
    compile.py             compiled functions for any number of lanes
    pieces.py              embedding and head, compiled each by itself
    forward.py             the model in pieces: prelude, recur, read_out, head
    readings.py            readings of states and logits, for exit rules
    exits.py               exit rules: a lane leaves once it has converged
    transitions/           every change of the state: choose, enter, settle, fetch, emit, start
    routing.py             mixture-of-recursions: a router decides the exits
    sampling.py            Gumbel-max sampling on the device, penalties
    logprobs.py            log-probabilities of sampled tokens
    costs.py               measured costs of passes and read-outs
    readout_schedule.py    how long exits wait for others
    tick.py                the protocol of a tick, and what ticks share
    isolation.py           faults of one request
    warm_up.py             compile everything before the first request
    graphs.py              passes as CUDA graphs
    passes.py              a pass of the core over rows
    eager_tick.py          a tick whose lanes the host chooses
    decoders/              several positions of a request in flight: wave, diffusion
    staggered_tick.py      the eager tick with waves and diffusions
    graph_steps.py         the steps of a tick of fixed width
    notes.py               results of passes, read while the next ones run
    graph_tick.py          a tick of fixed width, as CUDA graphs
    admission.py           the decoders and exits that go with a model
    relaxation.py          LoRA, norms and biases of each row's own depth
    adapters/              models in the engine's pieces
    loop.py                admit, prompt, step, release
"""
