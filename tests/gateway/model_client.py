"""Calls a model by an official SDK, and prints what it returns or raises, a JSON line a call. Run by the SDKs' Python.

Arguments: the provider, the base URL, a JSON list of calls (a method's name, and its keyword arguments), and how often
the SDK tries again.
"""

import functools
import json
import sys

import anthropic
import openai

provider, base_url, calls, retries = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
if provider == "openai":
    client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="the-agents-own", max_retries=retries)
else:
    client = anthropic.Anthropic(base_url=base_url, api_key="the-agents-own", max_retries=retries)

for name, arguments in calls:
    try:
        answer = functools.reduce(getattr, name.split("."), client)(**arguments)
        if arguments.get("stream"):
            said = [event.model_dump(mode="json") for event in answer]
        else:
            said = answer.model_dump(mode="json")
        print(json.dumps({"answer": said}))
    except (openai.APIStatusError, anthropic.APIStatusError) as error:
        print(json.dumps({"status": error.status_code, "message": str(error), "kind": type(error).__name__}))
    except Exception as error:
        print(json.dumps({"message": str(error), "kind": type(error).__name__}))
