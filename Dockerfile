# potstill in a container; the Kubernetes templates name it potstill:latest. With the exact versions of constraints.txt.
#   docker build -t potstill .                                                          # the torch that pip takes here
#   docker build -t potstill --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 .  # CUDA's libraries in the base
#   docker build -t potstill --build-arg PIP_OPTIONS="-i URL" .                # a mirror, or the CPU build of torch
# torch's CUDA build brings the CUDA libraries that it needs, so that the plain base serves GPU nodes too.
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG EXTRAS=object-store,datasets,tracking
ARG PIP_OPTIONS=

# Triton compiles its launchers when it first runs; an image without Python (CUDA's) gets that of its distribution.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && { command -v python3 || apt-get install -y --no-install-recommends python3 python3-dev python3-venv; } \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 10001 potstill
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

WORKDIR /opt/potstill
COPY LICENSE README.md constraints.txt pyproject.toml setup.py ./
COPY common common
COPY kernels kernels
COPY launch launch
COPY storage storage
COPY student_train student_train
COPY teacher_dump teacher_dump
COPY src src
RUN python -m pip install ${PIP_OPTIONS} -c constraints.txt ".[${EXTRAS}]"

USER 10001
WORKDIR /home/potstill
HEALTHCHECK NONE
CMD ["potstill", "--help"]
