"""The generator's app on top of a fleet: the same routes, jobs and streams, in a deployment without a GPU."""

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

from fastapi import FastAPI
from ray import serve
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flux2_ray.fleet import Fleet
from flux2_ray.generator import GeneratorInfo
from flux2_ray.remote_encoder import remote_encoder
from flux2_ray.replica_count import ReplicaCount
from flux2_shared.observability.logs import set_up_logs
from flux2_shared.web.health import Readiness
from generator_service.app import Backend, build_app
from generator_service.clients.readiness import EncoderCheck
from generator_service.engine.latency import LatencyModel
from generator_service.settings import GeneratorSettings

ENCODER = "text-encoder"
GENERATOR = "generator"
INGRESS = "api"


def create_app() -> FastAPI:
    """Create the app of the ingress, whose single replica holds the jobs and the queue."""
    settings = GeneratorSettings()
    set_up_logs(settings.log_level, settings.log_format)

    @asynccontextmanager
    async def open_backend(app: FastAPI) -> AsyncIterator[Backend]:
        name = serve.get_replica_context().app_name
        generators = serve.get_deployment_handle(GENERATOR, app_name=name)
        encoder = remote_encoder(serve.get_deployment_handle(ENCODER, app_name=name), settings)
        info: GeneratorInfo = await generators.info.remote()
        check = EncoderCheck(encoder, info.model, info.embedding_shape, settings.encoder_grace_s)
        async with ReplicaCount(name) as replicas, aclosing(check):
            fleet = Fleet(
                generators,
                info.model,
                latency_model(info),
                lambda: replicas.running(GENERATOR),
                settings.max_waiting,
                app.state.metrics,
                settings.queue_share(),
            )

            async def is_ready() -> Readiness:
                if not replicas.running(GENERATOR):
                    return Readiness(is_ready=False, reason="no generator is running")
                return await check()

            try:
                yield Backend(fleet, info.embedding_shape, is_ready)
            finally:
                fleet.close()

    app = build_app(open_backend, settings)
    app.add_middleware(WithoutRequestId)
    return app


class WithoutRequestId:
    """Middleware that removes ``x-request-id`` from responses, because Serve's proxy adds it again."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
            await send(message)

        await self._app(scope, receive, send_without)


def latency_model(info: GeneratorInfo) -> LatencyModel:
    """Create a latency model from the measurements of a generator's warm-up."""
    model = LatencyModel()
    if info.latency is not None:
        for num_computed, num_steps in ((3, 3), (1, 3)):
            model.observe(
                info.model.default_num_tokens,
                num_computed=num_computed,
                num_steps=num_steps,
                denoise_s=info.latency.denoise_s(num_computed, num_steps),
                decode_s=info.latency.decode_s,
            )
    return model
