"""Training: one rank's whole life.

The story, in call order: `loop.train` opens the corpus, builds the engine (`engine.Engine`), resumes
(`checkpoint.resume`), and for each global batch calls `step.training_step`, records it (`record.Recorder`: what the
`guard` let pass, the routers' `health`, the `timing`), validates and saves.
"""
