"""SGLang's real HTTP front end, without its engine, which needs a GPU: routes, schemas and checks are SGLang's own, and
so is what joins a group and receives weights in it.

    python sglang_app.py PORT

What accelerator packages would provide are names without content. Responses are those of `stand_in.response`.
"""

import asyncio
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import uvicorn
from fastapi import Response
from safetensors import safe_open

from megatron_orz.rollout import sglang_main
from megatron_orz.rollout.sglang_main import Secret
from megatron_orz.rollout.token import server_token
from tests.rollout import stand_in

ABSENT = {"sgl_kernel", "flashinfer", "triton", "IPython", "torchvision"}
VOCAB_SIZE = 1000
LAYOUT = {"tp_size": 1, "pp_size": 1, "dp_size": 1, "dtype": "bfloat16"}
"""Of /server_info, which tells all of SGLang's arguments."""

# These look for such packages themselves: they are imported before it is pretended that there are any.
IMPORTED_BEFORE = (
    "torch.utils.flop_counter",
    "torch._inductor.runtime.triton_heuristics",
    "torch._inductor.compile_fx",
    "transformers.models.auto.image_processing_auto",
)


class _Anything(type):
    """The type of a class that has every attribute, and decorates by returning what it is given."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return "cpu" if name == "backend" else _anything(name)

    def __getitem__(cls, item: object) -> Any:
        return cls

    def __or__(cls, other: object) -> Any:
        return cls

    def __ror__(cls, other: object) -> Any:
        return cls

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and not kwargs and callable(args[0]) else super().__call__()


def _anything(name: str) -> Any:
    return _Anything(
        name,
        (),
        {
            "__call__": lambda self, *args, **kwargs: args[0] if args and callable(args[0]) else self,
            "__getattr__": lambda self, attribute: "cpu" if attribute == "backend" else _anything(attribute),
        },
    )


class _EmptyModule(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012  # a package, as far as the import system looks

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return "0.0"
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, value := _anything(name))
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        is_absent = name.split(".")[0] in ABSENT
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_absent else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _EmptyModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class Engine:
    """In place of SGLang's tokenizer manager: checks a request as that does, and answers it."""

    is_generation = True
    model_path = served_model_name = "policy"
    model_config = SimpleNamespace(
        is_image_understandable_model=False,
        is_audio_understandable_model=False,
        hf_config=SimpleNamespace(model_type="qwen2", architectures=["Qwen2ForCausalLM"]),
    )

    def __init__(self) -> None:
        self.version = "default"
        self.loaded: list[str] = []
        self.server_args = SimpleNamespace(
            resolved_dict=lambda: LAYOUT, launch_command="", kv_events_config=None, page_size=None
        )
        self.startup_time = 0.0
        self._weights = _weight_updater()
        self._has_session = False

    def config_value(self, name: str) -> str | None:
        return self.version if name == "weight_version" else None

    async def generate_request(self, request: Any, http_request: Any) -> AsyncIterator[Any]:
        from sglang.srt.sampling.sampling_params import SamplingParams

        prompt, given = request.input_ids, request.sampling_params
        request.normalize_batch_and_arguments()
        params = SamplingParams(**given)
        params.normalize(SimpleNamespace(encode=lambda text, **options: list(text)))
        params.verify(VOCAB_SIZE)
        assert params.no_stop_trim
        siblings = [
            {
                "text": "",
                "output_ids": (ids := stand_in.response(prompt, 0, sibling, int(self.version))),
                "meta_info": {
                    "id": f"random-{sibling}",
                    "finish_reason": {"type": "length", "length": len(ids)},
                    "weight_version": self.version,
                    "output_token_logprobs": [[-0.5 * step, token, None] for step, token in enumerate(ids)],
                },
            }
            for sibling in range(params.n)
        ]
        yield siblings if params.n > 1 else siblings[0]

    async def update_weights_from_disk(self, request: Any, http_request: Any) -> tuple[bool, str, int]:
        files = sorted(Path(request.model_path).glob("*.safetensors"))
        self.loaded = []
        for file in files:
            with safe_open(file, "pt") as weights:
                self.loaded += [f"{name}={weights.get_tensor(name).sum().item():g}" for name in weights.keys()]  # noqa: SIM118
        if not self.loaded:
            return False, f"no weights in {request.model_path}", 0
        assert request.flush_cache
        self.version = request.weight_version
        return True, "loaded " + " ".join(self.loaded), 0

    async def get_internal_state(self) -> list[Any]:
        return []

    async def init_weights_update_group(self, request: Any, http_request: Any) -> tuple[bool, str]:
        fields = ("master_address", "master_port", "rank_offset", "world_size", "group_name", "backend")
        values = [getattr(request, field) for field in fields]
        return await asyncio.to_thread(self._weights.init_weights_update_group, *values)

    async def destroy_weights_update_group(self, request: Any, http_request: Any) -> tuple[bool, str]:
        answer: tuple[bool, str] = self._weights.destroy_weights_update_group(request.group_name)
        return answer

    async def begin_weight_update(self, request: Any, http_request: Any) -> tuple[bool, str]:
        was_open, self._has_session, self.loaded = self._has_session, True, []
        return not was_open, "a weight-update session is already open" if was_open else "Success"

    async def end_weight_update(self, request: Any, http_request: Any) -> tuple[bool, str]:
        was_open, self._has_session = self._has_session, False
        return was_open, "Success" if was_open else "no weight-update session is open"

    async def update_weights_from_distributed(self, request: Any, http_request: Any) -> tuple[bool, str]:
        assert self._has_session
        assert request.flush_cache
        received = await asyncio.to_thread(
            self._weights.receive_weights_from_distributed,
            names=request.names,
            dtypes=request.dtypes,
            shapes=request.shapes,
            group_name=request.group_name,
            load_format=request.load_format,
        )
        self.loaded += [f"{name}={weight.sum().item():g}" for name, weight in received]
        return True, "Succeeded to update parameter online."

    async def update_weight_version(self, request: Any) -> None:
        self.version = request.new_version


def _weight_updater() -> Any:
    """What receives weights in each of SGLang's workers, without a model to load them into."""
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    model: dict[str, Any] = dict.fromkeys(
        ("model_config", "get_model", "update_model_fields", "recapture_cuda_graph", "get_model_runner")
    )
    return WeightUpdater(tp_rank=0, device="cpu", gpu_id=0, custom_weight_loaders={}, **model)


def pretend() -> None:
    """From here on, imports of what accelerators need succeed."""
    for name in IMPORTED_BEFORE:
        importlib.import_module(name)
    sys.meta_path.insert(0, _Finder())


def print_server_args() -> None:
    """What SGLang would run, and log, given the arguments of this process."""
    pretend()
    import sglang.launch_server

    sglang.launch_server.run_server = print
    sglang_main.main(sys.argv[1:])


def main(port: int) -> None:
    pretend()
    from sglang.srt.entrypoints import http_server
    from sglang.srt.utils.auth import add_api_key_middleware

    engine = Engine()
    http_server.set_global_state(
        SimpleNamespace(tokenizer_manager=engine, template_manager=None, scheduler_info={})  # type: ignore[arg-type]
    )
    http_server.get_serving = lambda: SimpleNamespace(tokenizer_path="policy", preferred_sampling_params=None)
    http_server.app.add_api_route("/loaded", lambda: engine.loaded)
    counter = 'sglang:realtime_tokens_total{mode="decode"} 1.0\n'
    http_server.app.add_api_route("/metrics", lambda: Response(counter, media_type="text/plain"))
    # As the server itself does with the key that `sglang_main` gives it.
    add_api_key_middleware(http_server.app, api_key=Secret(server_token()), admin_api_key=None)
    uvicorn.run(http_server.app, host="127.0.0.1", port=port, lifespan="off", log_level="warning")


if __name__ == "__main__":
    main(int(sys.argv[1]))
