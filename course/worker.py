"""The process in which a graded file runs: it has the file and torch, and nothing of the course.

course/grader.py starts it and talks to it in lines of JSON. It hears the name of a function and
tensors, and answers with a tensor, a gradient or an error. What it says is data: whatever a graded
file does here, it can only make its own answers wrong. Both ends of the pipe are a `Peer`, because
a function under test may call an earlier one, which the grader then computes.
"""

import contextlib
import functools
import json
import os
import sys
import types

import torch

LONGEST = 2 ** 24                       # bytes of one message
MEMORY = 2 ** 31                        # bytes that a graded file may take
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64,
    torch.uint8, torch.bool)}


def encode(x):
    if not isinstance(x, torch.Tensor):
        return x if isinstance(x, (bool, int, float, str)) else repr(x)[:200]
    data = x.detach().double() if x.is_floating_point() else x
    return {"dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape),
            "data": data.flatten().tolist(), "grad": x.requires_grad}


def decode(x):
    if not isinstance(x, dict):
        return x
    return torch.tensor(x["data"], dtype=DTYPES[x["dtype"]]).view(x["shape"])


class Peer:
    """One end of the pipe. `functions`: what the other end may call."""

    def __init__(self, reader, writer, functions=None):
        self.reader, self.writer, self.functions = reader, writer, functions or {}
        self.results = []                               # of the calls served: (output, inputs)

    def send(self, message):
        self.writer.write(json.dumps(message).encode() + b"\n")
        self.writer.flush()

    def receive(self):
        line = self.reader.readline(LONGEST)
        if not line.endswith(b"\n"):
            raise EOFError
        return json.loads(line)

    def ask(self, **request):
        """Send a request; serve what the other end asks until its answer has come."""
        self.send(request)
        while "ask" in (message := self.receive()):
            self.send(self.answer(message))
        return message

    def answer(self, request):
        try:
            return getattr(self, f"do_{request['ask']}")(**request)
        except BaseException as error:                  # SystemExit and pytest.skip() are, too
            return {"error": str(error)[:2000], "line": line_of(error, "<graded>"),
                    "types": [kind.__name__ for kind in type(error).__mro__]}

    def do_call(self, ask, name, args):
        """args: by position ("0", "1") or by name."""
        inputs = {key: decode(x) for key, x in args.items()}
        for key, x in inputs.items():
            if isinstance(x, torch.Tensor) and args[key]["grad"]:
                x.requires_grad_()
        before = {key: json.dumps(encode(x)) for key, x in inputs.items()}
        output = self.functions[name](*[x for key, x in inputs.items() if key.isdigit()],
                                      **{key: x for key, x in inputs.items() if not key.isdigit()})
        self.results.append((output, inputs))
        changed = {key: encode(x) for key, x in inputs.items()
                   if json.dumps(encode(x)) != before[key]}
        return {"result": encode(output), "changed": changed, "of": len(self.results) - 1}

    def do_gradient(self, ask, of, gradient):
        output, inputs = self.results[of]
        wanted = with_gradient(inputs)
        found = torch.autograd.grad(output, wanted, decode(gradient), retain_graph=True,
                                    allow_unused=True)
        return {"gradients": [None if x is None else encode(x) for x in found]}

    def call(self, name, *args, request=None, **kwargs):
        """A function of the other end, as if it were here: gradients, too, and changed inputs."""
        inputs = {str(i): x for i, x in enumerate(args)} | kwargs
        answer = self.ask(ask="call", name=name, args={key: encode(x) for key, x in inputs.items()},
                          **(request or {}))
        raise_error(answer)
        with torch.no_grad():
            for key, value in answer["changed"].items():
                inputs[key].copy_(decode(value))
        result = decode(answer["result"])
        if not isinstance(result, torch.Tensor):
            raise TypeError(f"expected a tensor, got {result!r}")
        if not answer["result"]["grad"]:
            return result
        return Remote.apply(self, answer["of"], result, *with_gradient(inputs))


def with_gradient(inputs):
    return [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]


class Remote(torch.autograd.Function):
    """A result whose graph is at the other end."""

    @staticmethod
    def forward(ctx, peer, of, result, *inputs):
        ctx.peer, ctx.of = peer, of
        return result

    @staticmethod
    def backward(ctx, gradient):
        answer = ctx.peer.ask(ask="gradient", of=ctx.of, gradient=encode(gradient))
        raise_error(answer)
        return (None, None, None, *map(decode, answer["gradients"]))


class GradedError(Exception):
    """Another exception of the graded file than ValueError and NotImplementedError."""


def raise_error(answer):
    if "error" not in answer:
        return
    for kind in (ValueError, NotImplementedError):
        if kind.__name__ in answer["types"]:
            break
    else:
        kind, answer["error"] = GradedError, f"{answer['types'][0]}: {answer['error']}"
    error = kind(answer["error"])
    error.line = answer["line"]
    raise error


def line_of(error, file):
    """The innermost line of the file in the error's traceback, or None."""
    line, trace = None, error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == file:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


class Graded(Peer):
    """The end with the graded file."""

    def do_load(self, ask, source, names):
        sys.modules["tvkd"] = None                      # an installed one would be the solution
        sys.modules["my_tvkd"] = self.module = types.ModuleType("my_tvkd")
        exec(compile(source, "<graded>", "exec"), vars(self.module))
        self.own = {name: getattr(self.module, name, None) for name in names}
        return {"functions": [name for name, f in self.own.items() if callable(f)]}

    def do_call(self, ask, name, served, **rest):
        """served: functions that the grader computes where the one under test calls them."""
        self.functions = self.own
        for other in self.own:
            function = functools.partial(self.call, other) if other in served else self.own[other]
            setattr(self.module, other, function)
        return super().do_call(ask, name, **rest)


def limit_memory():
    with contextlib.suppress(ImportError, OSError, ValueError):     # Linux has both, Windows none
        import resource
        with open("/proc/self/statm", encoding="ascii") as file:
            most = int(file.read().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))           # pipes yes, files no


def main():
    torch.set_num_threads(1)
    pipe = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    for number in range(3):                             # what the graded file prints goes nowhere
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    limit_memory()
    peer = Graded(*pipe)
    with contextlib.suppress(EOFError, BrokenPipeError):
        peer.send({"ready": True})                      # torch is imported, which may take long
        while True:
            peer.send(peer.answer(peer.receive()))


if __name__ == "__main__":
    main()
