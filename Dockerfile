# Images of both services: `--target text-encoder` and `--target generator`. They share all layers up to torch, so these
# are stored and transferred once.

# The tested base image, for all platforms. Other Debian-based images with Python 3.11 or newer work too.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d

# Empty by default. For hosts without a package index, pass a folder of wheels with --build-context wheels=FOLDER.
FROM scratch AS wheels

# Builds this project's wheel, so that the images contain neither the source tree nor build tools.
FROM ${PYTHON_IMAGE} AS project
WORKDIR /project
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip wheel --no-deps --wheel-dir /dist .

FROM ${PYTHON_IMAGE} AS runtime
# Triton, PyTorch's compiler for GPUs, needs a C compiler to build its launcher.
# hadolint ignore=DL3008 # Debian keeps one version of it for each release
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
# An index with another build of torch, for example for CUDA 12 or CPUs; PyPI's build is for CUDA 13.
ARG TORCH_INDEX_URL=
ENV PIP_ROOT_USER_ACTION=ignore \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
COPY constraints.txt /
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,from=wheels,target=/wheels \
    python -m pip install -c /constraints.txt --find-links /wheels \
        ${TORCH_INDEX_URL:+--extra-index-url "${TORCH_INDEX_URL}"} torch
# 1000 is the first user of most hosts, so that secret files are readable. A new volume inherits the folder's owner.
RUN useradd --uid 1000 --no-create-home flux2 && install --directory --owner flux2 --group flux2 /weights /compiled
# The root file system is read-only: /weights contains the hub's cache, and libraries write to /tmp.
# The weights leave little GPU memory, and images of different sizes fragment it. Expandable segments avoid that. A
# container may override this variable, or set PYTORCH_CUDA_ALLOC_CONF, which takes precedence.
ENV HF_HOME=/weights \
    HOME=/tmp \
    PYTORCH_ALLOC_CONF=expandable_segments:True

# Both services with Ray, for deploy/ray/rayservice.yaml. KubeRay sets the command; its health checks need wget.
FROM runtime AS ray
# hadolint ignore=DL3008 # Debian keeps one version of it for each release
RUN apt-get update && apt-get install --yes --no-install-recommends wget && rm -rf /var/lib/apt/lists/*
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,from=project,source=/dist,target=/dist \
    python -m pip install -c /constraints.txt "$(echo /dist/*.whl)[text-encoder,generator,ray]"
USER 1000:1000

FROM runtime AS text-encoder
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,from=project,source=/dist,target=/dist \
    python -m pip install -c /constraints.txt "$(echo /dist/*.whl)[text-encoder,quantization]"
USER 1000:1000
CMD ["python", "-m", "text_encoder_service"]

FROM runtime AS generator
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,from=project,source=/dist,target=/dist \
    python -m pip install -c /constraints.txt "$(echo /dist/*.whl)[generator,quantization]"
USER 1000:1000
CMD ["python", "-m", "generator_service"]
