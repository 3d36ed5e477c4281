"""Holds the sidecar's chat templates and tokenizers against Python's `transformers`.

Real tokenizers and real chat templates come out of published packages. For each template
conversations are made up, `transformers` renders and tokenizes them, and the program given on the
command line has to come to the same ids from the HTTP body: whole, in parts, and remembered.

    oracle.py fetch DIR          an environment with transformers, and the packages, into DIR
    oracle.py check DIR PROGRAM [CONVERSATIONS [NAME]]
"""

import glob
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import venv
import zipfile

PACKAGES = {
    "litellm==1.109.1": "litellm/litellm_core_utils/tokenizers/*_tokenizer.json",
    "trl==1.16.0": "trl/chat_templates/*.jinja",
    "axolotl==0.19.0": "axolotl/utils/chat_templates/templates/*.jinja",
}
CRATE = ("dynamo-llm", "1.6.1")
CRATE_FILES = "tests/data/sample-models/TinyLlama_v1.1/"
TRANSFORMERS = ["transformers==5.23.0", "jinja2==3.1.6"]

SPECIAL = re.compile(r"<\|[^|<>\n]{1,40}\|>|<｜[^｜<>\n]{1,40}｜>|<(?:start|end)_of_turn>|\[/?[A-Z_]{3,20}\]")


def crate(name, version):
    """The crate's archive, which cargo keeps once it has been asked about it."""
    subprocess.run(["cargo", "info", "-q", f"{name}@{version}"], check=True, stdout=subprocess.DEVNULL)
    home = os.environ.get("CARGO_HOME", os.path.expanduser("~/.cargo"))
    [file] = glob.glob(os.path.join(home, f"registry/cache/*/{name}-{version}.crate"))
    return file


def fetch(where):
    os.makedirs(where, exist_ok=True)
    python = os.path.join(where, "venv/bin/python")
    if not os.path.exists(os.path.join(where, "venv/done")):
        venv.create(os.path.join(where, "venv"), with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *TRANSFORMERS], check=True)
        open(os.path.join(where, "venv/done"), "w").close()
    for package, pattern in PACKAGES.items():
        name = package.split("=")[0]
        if glob.glob(os.path.join(where, pattern)):
            continue
        command = [python, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "-d", where, package], check=True)
        [wheel] = glob.glob(os.path.join(where, f"{name}-*.whl"))
        parts = re.escape(pattern).replace(r"\*", "[^/]*") + "$"
        with zipfile.ZipFile(wheel) as archive:
            wanted = [n for n in archive.namelist() if re.match(parts, n)]
            archive.extractall(where, wanted)
        os.remove(wheel)
    if not os.path.exists(os.path.join(where, "tinyllama")):
        file = crate(*CRATE)
        os.makedirs(os.path.join(where, "tinyllama"))
        with tarfile.open(file) as archive:
            for member in archive:
                if CRATE_FILES + "tokenizer.json" in member.name:
                    data = archive.extractfile(member).read()
                    with open(os.path.join(where, "tinyllama/tokenizer.json"), "wb") as out:
                        out.write(data)
        os.remove(file)


WORDS = (
    "the quick brown fox can't jump over 12345 lazy dogs isn't it router sends each request to a worker "
    "that holds its prefix café naïve Straße 你好 世界 こんにちは 안녕하세요 привет мир مرحبا שלום हिन्दी "
    "ไทย 😀 👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200b \u00a0 ½ ﬁ ① 3.14159 0x7f a_b CamelCase https://example.org/?q=1&r=2 "
    "foo(bar) == !baz; x+=1 // ok <b>bold</b> {'k': \"v\"} [1, 2] \\n \\u0041 $\\frac{a}{b}$ -- … “quoted”"
).split(" ")
CODE = "def f(x):\n\treturn [i ** 2  for i in range(x)]\n\n\nclass A:\n    pass  # done\r\n"
JOINTS = [" "] * 12 + ["\n", "\n\n", "  ", "\t", "", ".", ", ", "   \n"]


def text(rng, specials, words):
    out = []
    for _ in range(words):
        out.append(rng.choice(WORDS))
        out.append(rng.choice(JOINTS))
        if rng.random() < 0.01:
            out.append(CODE)
        if specials and rng.random() < 0.01:
            out.append(rng.choice(specials))
    return "".join(out)


def plain(rng, words):
    return " ".join(rng.choice(WORDS[:20]) for _ in range(words))


def schema(rng):
    properties = {}
    for name in rng.sample(["city", "unit", "日付", "limit", "a&b", "<x>"], rng.randint(0, 4)):
        kind = rng.choice(["string", "integer", "number", "boolean"])
        properties[name] = {"type": kind, "description": rng.choice(WORDS)}
        if kind == "number":
            properties[name]["maximum"] = rng.choice([1.0, 1e20, 0.00001, 12.5])
    return {"type": "object", "properties": properties, "required": list(properties)[:1]}


def tool(rng, number):
    function = {"name": f"tool_{number}", "description": plain(rng, 6), "parameters": schema(rng)}
    return {"type": "function", "function": function}


def conversation(rng, number, specials):
    """The body of a request, and what vLLM makes of its messages and tools."""
    long = number % 100 == 99
    size = (lambda: rng.randint(1_000, 3_000)) if long else (lambda: rng.choice([0, 1, 3, 20, 60, 200]))
    messages = []
    if rng.random() < 0.6:
        messages.append({"role": "system", "content": text(rng, specials, size())})
    tools = [tool(rng, i) for i in range(rng.randint(1, 3))] if rng.random() < 0.3 else []
    for turn in range(rng.randint(1, 5)):
        messages.append({"role": "user", "content": text(rng, specials, size())})
        last = rng.random() < 0.3
        if last:
            break
        if tools and rng.random() < 0.5:
            arguments = {"city": rng.choice(WORDS), "n": rng.choice([1, 1.5, True, None, [1, {"a": "é"}]])}
            function = {"name": "tool_0", "arguments": arguments}
            call = {"id": "abcdef123", "type": "function", "function": function}
            messages.append({"role": "assistant", "content": text(rng, specials, size()), "tool_calls": [call]})
            answer = json.dumps({"result": rng.choice(WORDS)}, ensure_ascii=False)
            messages.append({"role": "tool", "tool_call_id": "abcdef123", "content": answer})
        reply = {"role": "assistant", "content": text(rng, specials, size())}
        if rng.random() < 0.2:
            reply["reasoning"] = plain(rng, 20)
        messages.append(reply)
    if rng.random() < 0.8 and messages[-1]["role"] != "user":
        messages.append({"role": "user", "content": text(rng, specials, size())})
    body = {"model": "m", "messages": []}
    given = []
    for message in messages:
        sent = json.loads(json.dumps(message))
        for call in sent.get("tool_calls", []):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=rng.random() < 0.5)
        body["messages"].append(sent)
        # The order of vLLM's chat utilities.
        seen = {"role": message["role"], "content": message["content"]}
        for key in ("tool_calls", "tool_call_id"):
            if key in message:
                seen[key] = message[key]
        if "reasoning" in message:
            seen["reasoning"] = seen["reasoning_content"] = message["reasoning"]
        given.append(seen)
    if tools:
        body["tools"] = tools
    prompt = rng.random() < 0.8
    body["add_generation_prompt"] = prompt
    kwargs = {}
    if rng.random() < 0.2:
        kwargs["enable_thinking"] = rng.random() < 0.5
        body["chat_template_kwargs"] = kwargs
    return body, given, tools or None, prompt, kwargs


def takes_parts(template):
    return bool(re.search(r"{%[-+]?\s*for\s+\w+\s+in\s+(?:content\b|\w+(?:\['content'\]|\[\"content\"\]|\.content\b))", template))


def models(where):
    tokenizers = sorted(glob.glob(os.path.join(where, "litellm/**/*_tokenizer.json"), recursive=True))
    tokenizers.append(os.path.join(where, "tinyllama/tokenizer.json"))
    templates = []
    for pattern in list(PACKAGES.values())[1:]:
        templates += sorted(glob.glob(os.path.join(where, pattern)))
    templates = [t for t in templates if not t.endswith("_training.jinja")]
    for number, template in enumerate(templates):
        name = "-".join([template.split(os.sep)[-3] if "trl" not in template else "trl", os.path.basename(template)[:-6]])
        yield name.replace("chat_templates", "axolotl"), tokenizers[number % len(tokenizers)], template


def check(where, program, count, only):
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    failed = refused = total = 0
    for name, tokenizer_file, template_file in models(where):
        if only and only not in name:
            continue
        with open(template_file, encoding="utf-8") as file:
            template = file.read()
        specials = sorted(set(SPECIAL.findall(template)))
        folder = os.path.join(where, "models", name)
        os.makedirs(folder, exist_ok=True)
        tokenizer = tokenizers.Tokenizer.from_file(tokenizer_file)
        tokenizer.add_special_tokens([*specials, "<s>", "</s>"])
        tokenizer.save(os.path.join(folder, "tokenizer.json"))
        named = {"bos_token": "<s>", "eos_token": "</s>"}
        with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as file:
            json.dump({**named, "chat_template": template}, file)
        theirs = PreTrainedTokenizerFast(
            tokenizer_file=os.path.join(folder, "tokenizer.json"), chat_template=template, **named
        )
        parts = takes_parts(template)
        rng = random.Random(name)
        ours = subprocess.Popen([program, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(count):
            body, messages, tools, prompt, kwargs = conversation(rng, number, specials)
            if parts:
                for message in messages:
                    message["content"] = [{"type": "text", "text": message["content"]}]
            try:
                arguments = dict(tools=tools, add_generation_prompt=prompt, **kwargs)
                ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **arguments)
                rendered = theirs.apply_chat_template(messages, tokenize=False, **arguments)
            except Exception as error:  # what a template raises, and what fails in it
                ids, rendered = None, f"{type(error).__name__}: {error}"
                refused += 1
            # As bytes of JSON are sent: lone surrogates are not.
            line = json.dumps({"body": json.dumps(body, ensure_ascii=False), "ids": ids, "text": rendered})
            ours.stdin.write(line + "\n")
        ours.stdin.close()
        verdict = ours.stdout.read().strip()
        total += count
        if ours.wait() != 0:
            failed += 1
        print(f"{name:34} {os.path.basename(tokenizer_file):28} {verdict}", flush=True)
    print(f"{total} conversations, of which templates refuse {refused}; {failed} templates differ")
    return failed


if __name__ == "__main__":
    if sys.argv[1] == "fetch":
        fetch(sys.argv[2])
    else:
        count = int(sys.argv[4]) if len(sys.argv) > 4 else 2_000
        sys.exit(check(sys.argv[2], sys.argv[3], count, sys.argv[5] if len(sys.argv) > 5 else None) > 0)
