"""The exact reference: transformers' own modelling code run without weights, every storage followed.

The only part of the planner that imports torch, transformers, peft and bitsandbytes, and only when
`planner estimate --exact` asks for it. `planner.exact.estimate.exact_estimate` is the way in. `adapters` and
`chunked_loss` are what the executor runs, too.
"""
