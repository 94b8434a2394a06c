"""In vLLM's environment: greedy tokens of prompts, or the error that loading ends in.

python -m tests.integrations.vllm_answers '{"engine": {...}, "prompts": [[1, 2], ...], "max_tokens": 8}'
"""

import json
import os
import sys

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # an error then arrives here as it was raised
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


def main(job):
    """One engine's answers: tokens, and the two largest log-probabilities of each position."""
    from vllm import LLM, SamplingParams

    engine = {"max_model_len": 512, "max_num_seqs": 32, "enforce_eager": True, "seed": 0, **job["engine"]}
    try:
        llm = LLM(**engine)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], logprobs=2)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], sampling, use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]
    best = [
        [sorted((each.logprob for each in place.values()), reverse=True)[:2] for place in answer.logprobs]
        for answer in answers
    ]
    return {"tokens": [list(answer.token_ids) for answer in answers], "best": best}


if __name__ == "__main__":
    os.environ.update(SETTINGS)
    print("RESULT", json.dumps(main(json.loads(sys.argv[1]))))
