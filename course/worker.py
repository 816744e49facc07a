"""The process in which a graded file runs: it has the file and torch, and nothing of the course.

course/grader.py starts it and talks to it in lines of JSON: the name of a function and tensors go
in, a tensor, a gradient or an error comes out. What it says is data: whatever a graded file does
here, it can only make its own answers wrong.
"""

import contextlib
import json
import os
import sys
import traceback
import types

import torch

MEMORY = 2 ** 31                        # bytes that a graded file may take
DTYPES = {str(dtype): dtype for dtype in (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64,
    torch.uint8, torch.bool)}


def encode(x):
    if not isinstance(x, torch.Tensor):
        return x if isinstance(x, (bool, int, float, str)) else repr(x)[:200]
    data = x.detach().double() if x.is_floating_point() else x
    return {"dtype": str(x.dtype), "shape": list(x.shape), "data": data.flatten().tolist(),
            "grad": x.requires_grad}


def decode(x):
    if not isinstance(x, dict):
        return x
    return torch.tensor(x["data"], dtype=DTYPES[x["dtype"]]).view(x["shape"])


def send(pipe, message):
    pipe.write(json.dumps(message).encode() + b"\n")
    pipe.flush()


def with_gradient(inputs):
    return [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]


class Worker:
    def __init__(self):
        self.results = []                               # of the calls so far: (output, inputs)

    def answer(self, do, **request):
        try:
            return getattr(self, do)(**request)
        except BaseException as error:                  # SystemExit and pytest.skip() are, too
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                     if frame.filename == "<graded>"]
            return {"error": str(error)[:2000], "line": lines[-1] if lines else None,
                    "types": [kind.__name__ for kind in type(error).__mro__]}

    def load(self, source):
        sys.modules["tvkd"] = None                      # an installed one would be the solution
        sys.modules["my_tvkd"] = self.module = types.ModuleType("my_tvkd")
        exec(compile(source.encode("latin-1"), "<graded>", "exec"), vars(self.module))
        return {}

    def call(self, name, args):
        """args: by position ("0", "1") or by name."""
        inputs = {key: decode(x) for key, x in args.items()}
        for key, x in inputs.items():
            if isinstance(x, torch.Tensor) and args[key]["grad"]:
                x.requires_grad_()
        if not hasattr(self.module, name):
            raise NotImplementedError(f"no function {name}")
        before = {key: json.dumps(encode(x)) for key, x in inputs.items()}
        output = getattr(self.module, name)(
            *[x for key, x in inputs.items() if key.isdigit()],
            **{key: x for key, x in inputs.items() if not key.isdigit()})
        self.results.append((output, inputs))
        changed = {key: encode(x) for key, x in inputs.items()
                   if json.dumps(encode(x)) != before[key]}
        return {"result": encode(output), "changed": changed, "of": len(self.results) - 1}

    def gradient(self, of, gradient):
        output, inputs = self.results[of]
        found = torch.autograd.grad(output, with_gradient(inputs), decode(gradient),
                                    retain_graph=True, allow_unused=True)
        return {"gradients": [None if x is None else encode(x) for x in found]}


def limit_memory():
    with contextlib.suppress(ImportError, OSError, ValueError):     # Linux has both, Windows none
        import resource
        with open("/proc/self/statm", encoding="ascii") as file:
            most = int(file.read().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))           # pipes yes, files no


def main():
    torch.set_num_threads(1)
    reader, writer = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    for number in range(3):                             # what the graded file prints goes nowhere
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    limit_memory()
    worker = Worker()
    with contextlib.suppress(BrokenPipeError):
        for line in reader:
            send(writer, worker.answer(**json.loads(line)))


if __name__ == "__main__":
    main()
