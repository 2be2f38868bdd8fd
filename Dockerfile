# Two images, each made by the Makefile's own targets, so that no step here is one that is run only here.
#
#   docker build -t loopwise .                       serves on an NVIDIA GPU
#   docker build -t loopwise:cpu --target cpu .      serves on the CPU, from the set that constraints.txt pins
#   docker run --gpus all --ipc=host -p 8000:8000 -v "$PWD/model:/model:ro" loopwise num_recurrences=8
#
# The base image brings make, the C++ compiler that torch.compile needs while serving, and the NUMA library that vLLM's
# CPU build loads. CUDA's own libraries come as packages with torch; the driver comes from the host.
FROM python:3.11-bookworm AS base
WORKDIR /opt/loopwise
# Whoever serves owns no file of the image, and keeps caches where anyone may write.
ENV HOME=/tmp PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1
EXPOSE 8000
ENTRYPOINT ["/opt/loopwise/.venv/bin/loopwise", "serve", "/model", "host=0.0.0.0"]

FROM base AS cpu
# Where torch's CPU build stands, if not on PyTorch's own index: --build-arg TORCH_INDEX=...
ARG TORCH_INDEX
COPY Makefile constraints.txt ./
RUN make deps
COPY . .
RUN make setup
USER nobody

FROM base AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY . .
RUN make setup GPU=1
USER nobody
