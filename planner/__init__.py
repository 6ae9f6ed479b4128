"""Planning with a trained model, its judgement and its report. Imports envs, pipeline.encoders, trainer and cache."""
