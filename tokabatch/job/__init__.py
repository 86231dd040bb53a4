"""The job file: strict schema, defaults, overrides; whatever is wrong is refused with file, line, key and remedy.

Inside: `scalars` (what a word means), `document` (YAML with lines), `fields` (kinds of value), then `keys`, `refusals`, `load`,
`generation` and `verify`, and `schema` on top.
"""

from tokabatch.job.generation import GenerationConfig, Setting
from tokabatch.job.keys import Key, KeySection
from tokabatch.job.load import Written
from tokabatch.job.schema import (
    FP8_NEEDS,
    EngineConfig,
    ErrorsConfig,
    FewShotConfig,
    InputConfig,
    Job,
    ModelConfig,
    OutputConfig,
    PromptConfig,
    fp8_key,
)
from tokabatch.job.verify import VerifyConfig, verifier_names, verifier_path

__all__ = [
    "FP8_NEEDS",
    "EngineConfig",
    "ErrorsConfig",
    "FewShotConfig",
    "GenerationConfig",
    "InputConfig",
    "Job",
    "Key",
    "KeySection",
    "ModelConfig",
    "OutputConfig",
    "PromptConfig",
    "Setting",
    "VerifyConfig",
    "Written",
    "fp8_key",
    "verifier_names",
    "verifier_path",
]
