"""All checks of ``flux2 doctor``, in the order in which a host is put right; what one finds out, later ones use."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from generator_service.doctor import configuration, download, gpus, libraries, memory, network, nvidia, profiles
from generator_service.doctor import model as models
from generator_service.doctor.check import Check, attempt, failed, isolated, skipped
from generator_service.doctor.host import Host
from generator_service.doctor.libraries import Libraries
from generator_service.doctor.weights_files import BrokenFile
from generator_service.pipelines.performance import Performance
from generator_service.settings import GeneratorSettings
from generator_service.weights import Service
from shared.settings import ServiceSettings
from text_encoder_service.settings import TextEncoderSettings


@dataclass
class Findings:
    """Facts that later checks use; until they are known, or if they cannot be known, they have neutral values."""

    host: Host
    only: Service | None = None
    settings: dict[Service, ServiceSettings] = field(default_factory=dict)
    generator: GeneratorSettings = field(default_factory=GeneratorSettings.model_construct)
    encoder: TextEncoderSettings = field(default_factory=TextEncoderSettings.model_construct)
    model: models.Model = field(default_factory=lambda: models.Model("", ""))
    problems: Mapping[str, str] = field(default_factory=dict)
    sizes: memory.Sizes | None = None
    libraries: Libraries = field(default_factory=Libraries)
    placements: dict[Service, gpus.Placement] = field(default_factory=dict)
    performance: Performance = field(default_factory=Performance)
    running: set[Service] = field(default_factory=set)


def examine(host: Host, only: Service | None = None) -> list[Check]:
    """Every check, without duplicates: some settings belong to both services.

    Args:
        host: the machine to check.
        only: the one service that is to run there. By default both, or the generator alone if ``TEXT_ENCODER_URL`` is
            another host's.
    """
    found = Findings(host, only)
    sections = {
        "settings": _check_settings,
        "model": _check_model,
        "libraries": _check_libraries,
        "gpus": _check_gpus,
        "ports": _check_ports,
        "profiles": _check_profiles,
        "memory": _check_memory,
        "files": _check_files,
        "services": _check_services,
    }
    checks = (check for name, section in sections.items() for check in isolated(name, partial(section, found)))
    return list(dict.fromkeys(checks))


def _check_settings(found: Findings) -> Iterator[Check]:
    yield from isolated("host", lambda: configuration.check_host(found.host))
    yield from isolated(".env", configuration.check_env_file)
    found.generator, checks = configuration.read_settings(GeneratorSettings)
    is_encoder_here = configuration.is_loopback(found.generator.text_encoder_url.host)
    if found.only is not Service.TEXT_ENCODER:
        found.settings[Service.GENERATOR] = found.generator
        yield from checks
    if found.only is Service.TEXT_ENCODER or (found.only is None and is_encoder_here):
        found.encoder, checks = configuration.read_settings(TextEncoderSettings)
        found.settings[Service.TEXT_ENCODER] = found.encoder
        yield from checks
    yield configuration.describe_services(tuple(found.settings), found.generator)


def _check_model(found: Findings) -> Iterator[Check]:
    host, any_settings = found.host, next(iter(found.settings.values()))
    parts = tuple(part for service in found.settings for part in models.PARTS[service])
    found.model = models.Model(any_settings.model, any_settings.revision)
    try:
        found.model = models.find(any_settings.model, any_settings.revision, parts, host)
    except BrokenFile as error:
        yield failed("model", str(error), "set FLUX2_MODEL to a folder that exists or to a hub id")
        return
    if found.model.path is not None:
        nothing: tuple[models.Model, dict[str, str]] = (found.model, {})
        inspected, checks = attempt("model", lambda: models.inspect(found.model, parts), nothing)
        found.model, found.problems = inspected
        yield from checks
    found.sizes, checks = attempt("memory", lambda: memory.sizes_of(found.model), None)
    yield from checks
    yield from isolated("model", lambda: download.check_presence(found.model, found.problems, host))
    if found.model.path is not None:
        fix = download.how_to_fetch(found.model, host)
        yield from models.check_parts(found.model, found.problems, parts, fix)
        yield from isolated("downloads", lambda: models.check_leftovers(found.model, host))
    yield from isolated("token", lambda: download.check_token(found.model, host))
    file_bytes = found.sizes.file_bytes if found.sizes else None
    yield from isolated("disk", lambda: download.check_disk(found.model, file_bytes, tuple(found.settings), host))


def _check_libraries(found: Findings) -> Iterator[Check]:
    services = tuple(found.settings)
    yield from isolated("python", libraries.check_python)
    yield from isolated("packages", lambda: libraries.check_packages(services))
    attention = None
    if Service.GENERATOR in found.settings:
        attention = profiles.attention_to_measure(found.generator, found.model)
    nothing = Libraries()
    found.libraries, checks = attempt("torch", lambda: libraries.read_libraries(found.host, attention), nothing)
    yield from checks
    yield from libraries.check_libraries(found.libraries, services)


def _check_gpus(found: Findings) -> Iterator[Check]:
    driver, checks = attempt("nvidia-smi", lambda: nvidia.read_driver(found.host), nvidia.Driver())
    yield from checks
    wanted = {service: gpus.device_setting(service, s, found.host) for service, s in found.settings.items()}
    large = {service: _weight_bytes(found, service) > gpus.LARGE_BYTES for service in found.settings}
    needs_gpu = any(device not in {"auto", "cpu"} or large[service] for service, device in wanted.items())
    yield from isolated(
        "nvidia driver", lambda: nvidia.check_driver(driver, found.libraries, found.host, needs_gpu=needs_gpu)
    )
    yield from isolated("gpus", lambda: gpus.check_gpus(found.libraries, driver, found.host))
    weight_bytes = {service: _weight_bytes(found, service) for service in found.settings}
    found.placements, checks = gpus.place(wanted, found.libraries, weight_bytes)
    yield from checks
    yield from isolated("compute mode", lambda: gpus.check_compute_mode(found.placements, driver))


def _check_ports(found: Findings) -> Iterator[Check]:
    for service, settings in found.settings.items():
        check, is_running = network.check_port(service, settings)
        found.running |= {service} if is_running else set()
        yield check
    yield from network.check_ports_differ(found.settings)


def _check_profiles(found: Findings) -> Iterator[Check]:
    if not found.placements:
        yield skipped("profiles", "they depend on the devices, which are not known")
        return
    is_compiled = False
    generator, encoder = (found.placements.get(service) for service in (Service.GENERATOR, Service.TEXT_ENCODER))
    if generator is not None:
        gpu = generator.gpu
        weight_bytes = _weight_bytes(found, Service.GENERATOR)
        found.performance = profiles.choose_generator_profile(found.generator, gpu, weight_bytes)
        is_compiled |= "compile" in found.performance.optimisations
        yield from profiles.check_generator_profile(found.generator, gpu, found.performance)
        yield from isolated("attention", lambda: profiles.check_attention(found.performance, gpu, found.libraries))
    if encoder is not None:
        is_compiled |= found.encoder.profile_on(encoder.gpu.capability if encoder.gpu else None) == "fast"
        yield from profiles.check_encoder_profile(found.encoder, encoder.gpu)
    has_gpu = any(placement.gpu for placement in found.placements.values())
    yield from isolated(
        "compiler",
        lambda: profiles.check_compiler(found.host, found.libraries, is_compiled=is_compiled, has_gpu=has_gpu),
    )
    yield from isolated("compile cache", lambda: profiles.check_caches(found.host, is_compiled=is_compiled))
    yield from isolated("allocator", lambda: profiles.check_allocator(found.host, has_gpu=has_gpu))


def _check_memory(found: Findings) -> Iterator[Check]:
    if found.sizes is None or found.problems or not found.placements:
        yield skipped("memory", "it can be counted once the model's files and the devices are known")
        return
    needs = [_need(found, found.sizes, placement) for placement in found.placements.values()]
    gpus_here = found.libraries.gpus
    yield from memory.check_gpu_memory(needs, found.placements, gpus_here, found.running)
    yield from memory.check_host_memory(needs, found.host.memory(), found.running)


def _need(found: Findings, sizes: memory.Sizes, placement: gpus.Placement) -> memory.Need:
    gpu = placement.gpu
    if placement.service is Service.TEXT_ENCODER:
        num_tokens = found.encoder.max_batch * found.model.prompt_format.max_sequence_length
        dtype = profiles.dtype_of(found.encoder, gpu)
        return memory.encoder_need(sizes, gpu, dtype, found.encoder.weights, num_tokens)
    largest = max((weights.largest_bytes for weights in found.model.weights.values()), default=0)
    is_offloaded = "offload" in found.performance.optimisations
    dtype = profiles.dtype_of(found.generator, gpu)
    return memory.generator_need(sizes, gpu, dtype, is_offloaded=is_offloaded, largest_file=largest)


def _weight_bytes(found: Findings, service: Service) -> int:
    return found.sizes.file_bytes[service] if found.sizes and found.sizes.file_bytes else 0


def _check_files(found: Findings) -> Iterator[Check]:
    if Service.GENERATOR in found.settings:
        settings = found.generator
        published = settings.published_host
        yield from isolated("keys", lambda: configuration.check_keys(settings, "generator", published))
        yield from isolated("key to send", lambda: configuration.check_key_to_send(settings))
        yield from isolated("schedules", lambda: configuration.check_schedules(settings))
        yield from isolated("adapters", lambda: configuration.check_adapters(settings))
        yield from configuration.check_warm_up_sizes(settings, found.model)
    if Service.TEXT_ENCODER in found.settings:
        yield from isolated("keys", lambda: configuration.check_keys(found.encoder, "text encoder"))


def _check_services(found: Findings) -> Iterator[Check]:
    if Service.GENERATOR in found.settings:
        yield from isolated("text encoder", lambda: network.check_encoder(found.generator, found.model))
        yield from isolated("upsampler", lambda: network.check_upsampler(found.generator))
