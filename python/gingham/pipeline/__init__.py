"""Pipeline parallelism: a model's layers in stages, one rank's of which run its micro-batches in the order of a schedule."""

from .model import pipeline as pipeline
