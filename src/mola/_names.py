"""The public names of mola, besides its error and version."""

# `X as X`: type checkers pass on only what is imported like this.
from mola.continual import ContinualOptions as ContinualOptions
from mola.continual import ContinualResult as ContinualResult
from mola.continual import continual as continual
from mola.evaluate import EvaluateOptions as EvaluateOptions
from mola.evaluate import EvaluateResult as EvaluateResult
from mola.evaluate import evaluate as evaluate
from mola.generate import GenerateOptions as GenerateOptions
from mola.generate import generate_text as generate_text
from mola.loading import load_model as load_model
from mola.loading import load_tokenizer as load_tokenizer
from mola.plan import PlanOptions as PlanOptions
from mola.plan import plan as plan
from mola.train import TrainOptions as TrainOptions
from mola.train import TrainResult as TrainResult
from mola.train import train as train
from mola.tuner import MolaConfig as MolaConfig
from mola.tuner import MolaLinear as MolaLinear
from mola.tuner import MolaModel as MolaModel
