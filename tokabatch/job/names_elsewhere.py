"""Names that settings have in other tools: which of our keys each is, or why there is none.

Where a name means several things, it stands with its section (`input.name`). Values likewise.
"""

from __future__ import annotations

from tokabatch.job.document import Path

_KEYS = {
    **dict.fromkeys(("max_completion_tokens", "max_new_tokens", "max_length", "max_output_tokens"), "max_tokens"),
    **dict.fromkeys(("stop_strings", "stop_sequences", "until", "stop_token", "eos_token"), "stop"),
    **dict.fromkeys(("num_return_sequences", "num_samples", "repeats"), "n"),
    **dict.fromkeys(("min_new_tokens", "min_length"), "min_tokens"),
    **{"top_logprobs": "logprobs", "bad_words_ids": "bad_words", "sequence_bias": "logit_bias", "random_seed": "seed"},
    **{"eos_token_id": "stop_token_ids", "temp": "temperature"},
    **dict.fromkeys(("sampling_params", "sampling", "gen_kwargs", "generation_kwargs", "generation_config"), "generation"),
    **dict.fromkeys(
        ("model_name_or_path", "model_name", "model_id", "model_path", "pretrained", "model.name", "model_args"), "model.path"
    ),
    **dict.fromkeys(("torch_dtype", "precision"), "model.dtype"),
    **dict.fromkeys(("dataset", "dataset_name", "dataset_path", "data", "input_file", "input_path"), "input.path"),
    **dict.fromkeys(("input.name", "input.config", "config_name", "dataset_config_name"), "input.subset"),
    **dict.fromkeys(("input.file", "input.files", "input.dir", "input.data"), "input.path"),
    **dict.fromkeys(("max_samples", "max_examples", "num_examples", "num_rows"), "input.limit"),
    **{"input.type": "input.format", "test_split": "input.split", "output_type": "mode"},
    **dict.fromkeys(("input.template", "prompt_template", "prompt.prompt", "prompt.text", "prompt.user"), "prompt.template"),
    **{"doc_to_text": "prompt.template", "doc_to_choice": "prompt.continuations", "doc_to_target": "verify.answer"},
    **dict.fromkeys(("output_dir", "output_file", "output_path"), "output.path"),
    **dict.fromkeys(("output.dir", "output.folder", "output.file"), "output.path"),
    **dict.fromkeys(("verify.type", "verify.verifier", "verify.function"), "verify.kind"),
    **dict.fromkeys(
        ("verify.reference", "verify.target", "verify.label", "verify.gold", "verify.ground_truth", "verify.column"),
        "verify.answer",
    ),
    **dict.fromkeys(("judge", "grader", "scorer", "evaluate", "metric", "metric_list"), "verify.kind"),
    **{"num_fewshot": "prompt.few_shot.k", "system_prompt": "prompt.system", "system_instruction": "prompt.system"},
    **dict.fromkeys(("apply_chat_template", "use_chat_template"), "prompt.chat"),
    **dict.fromkeys(("tensor_parallel_size", "tp_size", "tp"), "engine.tensor"),
    **dict.fromkeys(("pipeline_parallel_size", "pp_size", "pp"), "engine.pipeline"),
    **dict.fromkeys(("data_parallel_size", "dp_size", "dp", "num_gpus", "n_gpus", "gpus"), "engine.replicas"),
    **dict.fromkeys(("max_num_seqs", "batch_size", "max_batch_size", "max_running_requests"), "engine.max_running"),
    **dict.fromkeys(
        ("max_num_batched_tokens", "max_batch_prefill_tokens", "chunked_prefill_size", "max_prefill_tokens"),
        "engine.max_step_tokens",
    ),
    "block_size": "engine.page_size",
    **dict.fromkeys(("verify.num_workers", "verify.workers"), "verify.processes"),
    "verify.timeout": "verify.seconds",
}
"""Ours are whole keys where the last word alone has several meanings."""

_VALUES = {
    "model.dtype": {
        **dict.fromkeys(("bf16", "torch.bfloat16"), "bfloat16"),
        **dict.fromkeys(("fp16", "f16", "half", "torch.float16", "torch.half"), "float16"),
        **dict.fromkeys(("fp32", "f32", "float", "full", "torch.float32"), "float32"),
        **dict.fromkeys(("fp64", "f64", "double", "torch.float64"), "float64"),
    },
    "engine.device": {
        **dict.fromkeys(("gpu", "cuda:0", "nvidia"), "cuda"),
        **{f"cuda:{number}": f"cuda, and start with CUDA_VISIBLE_DEVICES={number}" for number in range(1, 8)},
    },
    "mode": {
        **dict.fromkeys(("chat", "completion", "completions", "generate_until", "sample"), "generate"),
        **dict.fromkeys(("loglikelihood", "loglikelihood_rolling", "multiple_choice"), "score"),
    },
}
"""By key: how other tools write a value, and ours."""

_COLUMN = 'a column is named in prompt.template, as in "{{ question }}", or by prompt.messages'
_BEAMS = "beam search is not supported; generation.n draws several samples"
_BEST = (
    "samples are not ranked by their probability; generation.n draws several, and verify (a judge of yours) or `mode: score` "
    "gives scores to choose by"
)
_FILTERS = "not supported; what narrows the choice of a token is top_k, top_p and min_p"
_REPEATS = "not supported; repetition_penalty, frequency_penalty and presence_penalty discourage repetition"
_STRUCTURE = "structured output is not supported"
_LORA = "adapters (LoRA) are not supported; merge the adapter into its model (in peft: merge_and_unload), and name that model"
_MEMORY = "none is needed: the KV cache takes what memory is free; engine.kv_cache_tokens limits it"
_CONTEXT = "none is needed: the context is the model's own (server.context: a server's); generation.max_tokens limits a sample"
_SHARED = "none is needed: what prompts share is always computed once"
_KERNELS = "none is needed: the device decides which kernels compute attention"
_CHAT = "none is needed: a chat template opens the assistant's turn, and a final message of the assistant is continued"
_SPECULATION = "speculative decoding is not supported"
_PROCESSES = "none is needed: as many processes are started as the host has use for"
_TIME = "no time limit applies to a sample; generation.max_tokens limits its length, and `tokabatch run --deadline` a start"
_PADDING = "none is needed: nothing is padded"
_CUT = "prompts are never cut; one that is too long becomes an error row"
_AT_ONCE = "none is needed: as many samples run at once as the memory takes; engine.max_running limits them"
_BATCH = "it belongs to OpenAI's API; `tokabatch batch REQUESTS.jsonl --model MODEL --to RESULTS.jsonl` answers its batch files"
_SLURM = "it is an option of Slurm; `tokabatch slurm JOB` writes a batch script and takes such options (--help)"
_HOSTS = "none is needed: one start uses the GPUs of its host; several hosts share a job by `tokabatch slurm` or `run --on ray`"
_TRACKING = "reporting to other services is not supported; the figures are in OUT/summary.json and `tokabatch status OUT`"
_WITHOUT_KEY = {
    "do_sample": "none is needed: generation.temperature 0 picks the most likely token, any other value draws",
    **dict.fromkeys(
        ("num_beams", "use_beam_search", "beam_width", "length_penalty", "early_stopping", "num_beam_groups"), _BEAMS
    ),
    "best_of": _BEST,
    **dict.fromkeys(("typical_p", "epsilon_cutoff", "eta_cutoff", "top_a", "tfs_z", "mirostat"), _FILTERS),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_repetition_penalty", "dry_multiplier"), _REPEATS),
    **dict.fromkeys(
        ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_decoding", "structured_outputs"), _STRUCTURE
    ),
    **dict.fromkeys(("response_format", "json_schema", "grammar"), _STRUCTURE),
    **dict.fromkeys(("logits_processors", "logits_processor"), "not supported; logit_bias and bad_words change single tokens"),
    **dict.fromkeys(
        ("echo", "prompt_logprobs"), "a sample is without its prompt; `mode: score` computes log-probabilities of given texts"
    ),
    **dict.fromkeys(
        ("skip_special_tokens", "detokenize"),
        "none is needed: the column text is without special tokens, token_ids has them all",
    ),
    "stream": "none is needed: finished samples are in OUT/data during the run; `tokabatch serve` streams answers",
    "penalty_alpha": "contrastive search is not supported; generation.temperature and top_p are",
    **dict.fromkeys(("max_concurrency", "concurrency", "num_concurrent"), _AT_ONCE),
    **dict.fromkeys(("custom_id", "endpoint", "completion_window"), _BATCH),
    **dict.fromkeys(("nodes", "partition", "job_name", "gpus_per_node", "time", "mem", "account", "qos"), _SLURM),
    **dict.fromkeys(("distributed_executor_backend", "num_nodes", "nnodes"), _HOSTS),
    "num_scheduler_steps": "none is needed: steps are prepared while others are computed (engine.queue_depth)",
    "load_format": "none is needed: weights are always read from *.safetensors",
    "filter_list": "none is needed: a verifier finds the answer in the text itself (`tokabatch keys verify`)",
    **dict.fromkeys(("fewshot_delimiter", "target_delimiter"), "write it where it belongs in prompt.template"),
    "fewshot_split": "none is needed: the examples are a file of their own, prompt.few_shot.path",
    "include_stop_str_in_output": "the column text ends in front of the stop text; token_ids has its tokens",
    **dict.fromkeys(("pad_token_id", "pad_token", "padding", "padding_side"), _PADDING),
    **dict.fromkeys(("timeout", "max_time", "request_timeout"), _TIME),
    **dict.fromkeys(("gpu_memory_utilization", "mem_fraction_static", "max_memory", "swap_space", "cpu_offload_gb"), _MEMORY),
    **dict.fromkeys(("max_model_len", "max_seq_len", "max_seq_length", "context_length", "ctx_size", "n_ctx"), _CONTEXT),
    **dict.fromkeys(("enable_prefix_caching", "disable_radix_cache", "use_cache", "cache_prompt"), _SHARED),
    "enable_chunked_prefill": "none is needed: long prompts are always computed in parts (engine.max_step_tokens)",
    **dict.fromkeys(
        ("enforce_eager", "disable_cuda_graph", "cuda_graphs"),
        "none is needed: a GPU runs steps as CUDA graphs where that pays off",
    ),
    **dict.fromkeys(("attn_implementation", "attention_backend", "use_flash_attention_2", "flash_attn"), _KERNELS),
    "engine.backend": "there is one engine; the device decides which kernels it uses",
    "trust_remote_code": "none is needed: a model's own code is never run",
    **dict.fromkeys(("load_in_8bit", "load_in_4bit"), "not supported; on a GPU, model.quantization=fp8 halves the weights"),
    **dict.fromkeys(("lora", "enable_lora", "max_loras", "lora_modules", "lora_path", "adapter", "peft"), _LORA),
    **dict.fromkeys(
        ("speculative_model", "speculative_config", "num_speculative_tokens", "draft_model", "assistant_model"), _SPECULATION
    ),
    **dict.fromkeys(("add_generation_prompt", "continue_final_message"), _CHAT),
    **dict.fromkeys(
        ("enable_thinking", "thinking", "reasoning_effort"),
        "it is a variable of the model's chat template; write it under prompt.chat_template_kwargs",
    ),
    **dict.fromkeys(("truncation", "truncate_prompt_tokens", "max_prompt_length"), _CUT),
    **dict.fromkeys(("text_column", "prompt_column", "column", "question_column", "text_field"), _COLUMN),
    **dict.fromkeys(("shuffle", "shuffle_seed"), "none is needed: rows are computed in the order that shares the most"),
    "log_samples": "none is needed: all samples are written, with the columns of their rows",
    **dict.fromkeys(("task", "tasks", "task_name"), "there is no list of tasks; jobs/gsm8k.yaml shows how one is written"),
    **dict.fromkeys(("cache_dir", "hf_home"), "none is needed: the hub's cache is where the variable HF_HOME says"),
    **dict.fromkeys(("token", "hf_token", "use_auth_token"), "none is needed: a token is read from the variable HF_TOKEN"),
    "streaming": "none is needed: the input is read piece by piece",
    **dict.fromkeys(("num_workers", "num_proc", "workers"), _PROCESSES),
    **dict.fromkeys(
        ("output.format", "output_format"), "the output is Parquet; `tokabatch export OUT --to FILE` writes .jsonl or .csv"
    ),
    **{
        name.replace("-", "_"): f"it is an option: `tokabatch run JOB --{name}`"
        for name in ("overwrite", "retry-errors", "repair")
    },
    **dict.fromkeys(("resume", "resume_from", "checkpoint_dir"), "none is needed: the same command continues a stopped run"),
    **dict.fromkeys(("wandb", "mlflow", "report_to", "wandb_project"), _TRACKING),
}


def hub_dataset(name: str) -> str:
    """How OWNER/NAME of the hub is written here, and what of it is read."""
    return f"hf://datasets/{name}, its split as input.split (such as test) and its subset, if it has several, as input.subset"


def our_name(path: Path) -> str:
    """The name that a key of another tool has here, or its last word as it is."""
    return _find(_KEYS, path) or str(path[-1])


def our_value(path: Path, value: object) -> str | None:
    """The value that one of another tool has here; None for other values."""
    return _VALUES.get(".".join(map(str, path)), {}).get(value.lower()) if isinstance(value, str) else None


def why_none(path: Path) -> str | None:
    """Why there is no key for a setting of another tool, and what to do; None for other names."""
    return None if _with_section(path) in _KEYS else _find(_WITHOUT_KEY, path)


def _find(table: dict[str, str], path: Path) -> str | None:
    return table.get(_with_section(path), table.get(str(path[-1])))


def _with_section(path: Path) -> str:
    return ".".join(str(part) for part in path[-2:])
