"""Puts toy stages in the place of the real ones, in every process that has this folder on PYTHONPATH."""

from lilpipe import stage

stage.STAGES |= {name: f"toy_{name}" for name in ("corpus", "pretrain", "sft", "register")}
