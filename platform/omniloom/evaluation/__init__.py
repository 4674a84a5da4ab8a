"""Scores through lm-eval.

The story, in call order: `harness.evaluate_item` loads a model into an lm-eval LM (`lm.OmniloomLM`) and runs one task
with its media kept, removed or shuffled; `baseline.UnigramLM` is what text scores are held against;
`harness.gather` puts a task's scores and its controls into one result.
"""
