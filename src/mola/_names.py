"""The public names of mola, besides its error and version."""

# `X as X`: type checkers re-export only names that are imported like this.
from mola.evaluation.evaluate import EvaluateOptions as EvaluateOptions
from mola.evaluation.evaluate import EvaluateResult as EvaluateResult
from mola.evaluation.evaluate import LossResult as LossResult
from mola.evaluation.evaluate import evaluate as evaluate
from mola.generation.decoding import generate_text as generate_text
from mola.generation.generate import GenerateOptions as GenerateOptions
from mola.insight.kernels import kernels_report as kernels_report
from mola.models.loading import load_model as load_model
from mola.models.plan import PlanOptions as PlanOptions
from mola.models.plan import plan as plan
from mola.models.tokenizer import load_tokenizer as load_tokenizer
from mola.skills.skills import Skills as Skills
from mola.studies.continual_learning.continual import ContinualOptions as ContinualOptions
from mola.studies.continual_learning.continual import ContinualResult as ContinualResult
from mola.studies.continual_learning.continual import continual as continual
from mola.training.train import TrainOptions as TrainOptions
from mola.training.train import TrainResult as TrainResult
from mola.training.train import train as train
from mola.tuner import MolaConfig as MolaConfig
from mola.tuner import MolaLinear as MolaLinear
from mola.tuner import MolaModel as MolaModel
