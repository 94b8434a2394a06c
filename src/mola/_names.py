"""The public names of mola, besides its error and version."""
# ruff: noqa: F401

from mola.continual import ContinualOptions, ContinualResult, continual
from mola.evaluate import EvaluateOptions, EvaluateResult, evaluate
from mola.generate import GenerateOptions, generate_text
from mola.loading import load_model, load_tokenizer
from mola.plan import PlanOptions, plan
from mola.train import TrainOptions, TrainResult, train
from mola.tuner import MolaConfig, MolaLinear, MolaModel
