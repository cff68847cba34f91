"""Runs all checks of ``flux2 doctor``, in the order in which problems should be fixed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from flux2_shared.model.subfolders import SUBFOLDERS, Service
from flux2_shared.settings import ServiceSettings
from generator_service.doctor import configuration, download, gpus, libraries, memory, network, nvidia, profiles
from generator_service.doctor import model as models
from generator_service.doctor.check import Check, attempt, failed, isolated, skipped
from generator_service.doctor.host import Host
from generator_service.doctor.libraries import Libraries
from generator_service.doctor.weights_files import BrokenFile
from generator_service.pipelines.optimizations.profiles import Performance
from generator_service.settings import GeneratorSettings
from text_encoder_service.settings import TextEncoderSettings


@dataclass
class Findings:
    """Facts that later checks use. They have neutral defaults until, or unless, they are known."""

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
    """Run all checks, without duplicates, since some settings are common to both services.

    Args:
        host: the machine to check.
        only: check for this service only. By default both, or only the generator if ``TEXT_ENCODER_URL`` is another
            host.
    """
    findings = Findings(host, only)
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
    checks = (check for name, section in sections.items() for check in isolated(name, partial(section, findings)))
    return list(dict.fromkeys(checks))


def _check_settings(findings: Findings) -> Iterator[Check]:
    yield from isolated("host", lambda: configuration.check_host(findings.host))
    yield from isolated(".env", configuration.check_env_file)
    findings.generator, checks = configuration.read_settings(GeneratorSettings)
    is_encoder_here = configuration.is_loopback(findings.generator.text_encoder_url.host)
    if findings.only is not Service.TEXT_ENCODER:
        findings.settings[Service.GENERATOR] = findings.generator
        yield from checks
    if findings.only is Service.TEXT_ENCODER or (findings.only is None and is_encoder_here):
        findings.encoder, checks = configuration.read_settings(TextEncoderSettings)
        findings.settings[Service.TEXT_ENCODER] = findings.encoder
        yield from checks
    yield configuration.describe_services(tuple(findings.settings), findings.generator)


def _check_model(findings: Findings) -> Iterator[Check]:
    host, any_settings = findings.host, next(iter(findings.settings.values()))
    parts = tuple(part for service in findings.settings for part in SUBFOLDERS[service])
    findings.model = models.Model(any_settings.model, any_settings.revision)
    try:
        findings.model = models.find(any_settings.model, any_settings.revision, parts, host)
    except BrokenFile as error:
        yield failed("model", str(error), "set FLUX2_MODEL to an existing folder or a hub id")
        return
    if findings.model.path is not None:
        nothing: tuple[models.Model, dict[str, str]] = (findings.model, {})
        inspected, checks = attempt("model", lambda: models.inspect(findings.model, parts), nothing)
        findings.model, findings.problems = inspected
        yield from checks
    findings.sizes, checks = attempt("memory", lambda: memory.sizes_of(findings.model), None)
    yield from checks
    yield from isolated("model", lambda: download.check_presence(findings.model, findings.problems, host))
    if findings.model.path is not None:
        fix = download.download_hint(findings.model, host)
        yield from models.check_parts(findings.model, findings.problems, parts, fix)
        yield from isolated("downloads", lambda: models.check_leftovers(findings.model, host))
    yield from isolated("token", lambda: download.check_token(findings.model, host))
    file_bytes = findings.sizes.file_bytes if findings.sizes else None
    yield from isolated("disk", lambda: download.check_disk(findings.model, file_bytes, tuple(findings.settings), host))


def _check_libraries(findings: Findings) -> Iterator[Check]:
    services = tuple(findings.settings)
    yield from isolated("python", libraries.check_python)
    yield from isolated("packages", lambda: libraries.check_packages(services))
    attention = None
    if Service.GENERATOR in findings.settings:
        attention = profiles.attention_to_measure(findings.generator, findings.model)
    nothing = Libraries()
    findings.libraries, checks = attempt("torch", lambda: libraries.read_libraries(findings.host, attention), nothing)
    yield from checks
    yield from libraries.check_libraries(findings.libraries, services)


def _check_gpus(findings: Findings) -> Iterator[Check]:
    driver, checks = attempt("nvidia-smi", lambda: nvidia.read_driver(findings.host), nvidia.Driver())
    yield from checks
    wanted = {service: gpus.device_setting(service, s, findings.host) for service, s in findings.settings.items()}
    large = {service: _weight_bytes(findings, service) > gpus.LARGE_BYTES for service in findings.settings}
    needs_gpu = any(device not in {"auto", "cpu"} or large[service] for service, device in wanted.items())
    yield from isolated(
        "nvidia driver", lambda: nvidia.check_driver(driver, findings.libraries, findings.host, needs_gpu=needs_gpu)
    )
    yield from isolated("gpus", lambda: gpus.check_gpus(findings.libraries, driver, findings.host))
    weight_bytes = {service: _weight_bytes(findings, service) for service in findings.settings}
    findings.placements, checks = gpus.place(wanted, findings.libraries, weight_bytes)
    yield from checks
    yield from isolated("compute mode", lambda: gpus.check_compute_mode(findings.placements, driver))


def _check_ports(findings: Findings) -> Iterator[Check]:
    for service, settings in findings.settings.items():
        check, is_running = network.check_port(service, settings)
        findings.running |= {service} if is_running else set()
        yield check
    yield from network.check_ports_differ(findings.settings)


def _check_profiles(findings: Findings) -> Iterator[Check]:
    if not findings.placements:
        yield skipped("profiles", "the devices are not known")
        return
    is_compiled = False
    generator, encoder = (findings.placements.get(service) for service in (Service.GENERATOR, Service.TEXT_ENCODER))
    if generator is not None:
        gpu = generator.gpu
        weight_bytes = _weight_bytes(findings, Service.GENERATOR)
        findings.performance = profiles.choose_generator_profile(findings.generator, gpu, weight_bytes)
        is_compiled |= "compile" in findings.performance.optimizations
        yield from profiles.check_generator_profile(findings.generator, gpu, findings.performance)
        yield from isolated(
            "attention", lambda: profiles.check_attention(findings.performance, gpu, findings.libraries)
        )
    if encoder is not None:
        is_compiled |= findings.encoder.profile_on(encoder.gpu.capability if encoder.gpu else None) == "fast"
        yield from profiles.check_encoder_profile(findings.encoder, encoder.gpu)
    has_gpu = any(placement.gpu for placement in findings.placements.values())
    yield from isolated(
        "compiler",
        lambda: profiles.check_compiler(findings.host, findings.libraries, is_compiled=is_compiled, has_gpu=has_gpu),
    )
    yield from isolated("compile cache", lambda: profiles.check_caches(findings.host, is_compiled=is_compiled))
    yield from isolated("allocator", lambda: profiles.check_allocator(findings.host, has_gpu=has_gpu))


def _check_memory(findings: Findings) -> Iterator[Check]:
    if findings.sizes is None or findings.problems or not findings.placements:
        yield skipped("memory", "the model's files or the devices are not known")
        return
    needs = [_need(findings, findings.sizes, placement) for placement in findings.placements.values()]
    gpus_here = findings.libraries.gpus
    yield from memory.check_gpu_memory(needs, findings.placements, gpus_here, findings.running)
    yield from memory.check_host_memory(needs, findings.host.memory(), findings.running)


def _need(findings: Findings, sizes: memory.Sizes, placement: gpus.Placement) -> memory.Need:
    gpu = placement.gpu
    if placement.service is Service.TEXT_ENCODER:
        num_tokens = findings.encoder.max_batch * findings.model.prompt_format.max_sequence_length
        dtype = profiles.dtype_of(findings.encoder, gpu)
        return memory.encoder_need(sizes, gpu, dtype, findings.encoder.weights, num_tokens)
    largest = max((weights.largest_bytes for weights in findings.model.weights.values()), default=0)
    is_offloaded = "offload" in findings.performance.optimizations
    dtype = profiles.dtype_of(findings.generator, gpu)
    return memory.generator_need(sizes, gpu, dtype, is_offloaded=is_offloaded, largest_file=largest)


def _weight_bytes(findings: Findings, service: Service) -> int:
    return findings.sizes.file_bytes[service] if findings.sizes and findings.sizes.file_bytes else 0


def _check_files(findings: Findings) -> Iterator[Check]:
    if Service.GENERATOR in findings.settings:
        settings = findings.generator
        published = settings.published_host
        yield from isolated("keys", lambda: configuration.check_keys(settings, "generator", published))
        yield from isolated("key to send", lambda: configuration.check_key_to_send(settings))
        yield from isolated("schedules", lambda: configuration.check_schedules(settings))
        yield from isolated("adapters", lambda: configuration.check_adapters(settings))
        yield from configuration.check_warm_up_sizes(settings, findings.model)
    if Service.TEXT_ENCODER in findings.settings:
        yield from isolated("keys", lambda: configuration.check_keys(findings.encoder, "text encoder"))


def _check_services(findings: Findings) -> Iterator[Check]:
    if Service.GENERATOR in findings.settings:
        yield from isolated("text encoder", lambda: network.check_encoder(findings.generator, findings.model))
        yield from isolated("upsampler", lambda: network.check_upsampler(findings.generator))
