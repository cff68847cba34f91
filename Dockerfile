# Both services: `--target text-encoder` and `--target generator`. One file, because everything up to torch is the same,
# and layers that are the same are stored and sent once.

# What the tests run with, for every platform. Any other Debian-based Python from 3.11 will do.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d

# Empty. A folder of wheels takes its place with --build-context wheels=FOLDER: for hosts that have no package index.
FROM scratch AS wheels

# Our own wheel, so that no source and no build tool gets into the images.
FROM ${PYTHON_IMAGE} AS project
WORKDIR /project
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip wheel --no-deps --wheel-dir /dist .

FROM ${PYTHON_IMAGE} AS runtime
# Triton, with which PyTorch compiles for GPUs, asks a C compiler to build its launcher.
# hadolint ignore=DL3008 # Debian keeps one version of it for each release
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
# An index with another build of torch than PyPI's, which is for CUDA 13: CUDA 12's, or the CPU's.
ARG TORCH_INDEX_URL=
ENV PIP_ROOT_USER_ACTION=ignore \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
COPY constraints.txt /
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,from=wheels,target=/wheels \
    python -m pip install -c /constraints.txt --find-links /wheels \
        ${TORCH_INDEX_URL:+--extra-index-url "${TORCH_INDEX_URL}"} torch
# The user of most hosts' first account, so that its secret files can be read. A new volume takes the folder's owner.
RUN useradd --uid 1000 --no-create-home flux2 && install --directory --owner flux2 --group flux2 /weights /compiled
# The root is read-only: /weights holds the hub's cache, /tmp whatever a library wants to write.
# Beside the weights a GPU has little room, and images of different sizes need pieces of different sizes: segments that
# grow leave no gaps. A container may set this variable to something else, or PYTORCH_CUDA_ALLOC_CONF, which wins.
ENV HF_HOME=/weights \
    HOME=/tmp \
    PYTORCH_ALLOC_CONF=expandable_segments:True

# Both services and Ray, for deploy/ray/rayservice.yaml. KubeRay brings the command, and asks how it is with wget.
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
