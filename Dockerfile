# Three images, each made by the Makefile's own targets, so that no step here is one that is run only here.
#
#   docker build -t loopwise .                           serves on an NVIDIA GPU, and does all the rest
#   docker build -t loopwise:cpu --target cpu .          serves on the CPU, and does all the rest
#   docker build -t loopwise:serve --target serve .      serves on the CPU, with less than half the packages
#   docker run --gpus all --ipc=host --read-only --tmpfs /tmp:exec,mode=1777 --cap-drop ALL --security-opt no-new-privileges \
#       -p 127.0.0.1:8000:8000 -e VLLM_API_KEY -v "$PWD/model:/model:ro" loopwise num_recurrences=8
#
# Packages come by the hashes in supply/. The base image is named by its tag and is not verified: a release that is built with
# a registry at hand should append its digest, `python:3.11-bookworm@sha256:...` (docs/release.md).
# The base image brings make, the C++ compiler that torch.compile needs while serving, and the NUMA library that vLLM's
# CPU build loads. CUDA's own libraries come as packages with torch; the driver comes from the host.
FROM python:3.11-bookworm AS base
WORKDIR /opt/loopwise
# Whoever serves owns no file of the image, and keeps caches where anyone may write.
ENV HOME=/tmp PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1
EXPOSE 8000
HEALTHCHECK --start-period=10m --timeout=10s CMD ["/opt/loopwise/.venv/bin/python", "-c", \
    "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["/opt/loopwise/.venv/bin/loopwise", "serve", "/model", "host=0.0.0.0"]

FROM base AS serve
ARG TORCH_INDEX
COPY . .
RUN make serve-only
USER nobody

FROM base AS cpu
# Where torch's CPU build stands, if not on PyTorch's own index: --build-arg TORCH_INDEX=...
ARG TORCH_INDEX
COPY Makefile constraints.txt ./
COPY supply supply
RUN make deps
COPY . .
RUN make setup
USER nobody

FROM base AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY . .
RUN make setup GPU=1
USER nobody
