# docker build --target cpu --tag megatron_orz:cpu .       # trainer, tests and a vLLM server on the CPU
# docker build --target cuda --tag megatron_orz:cuda .     # the same on Hopper GPUs; driver 580 or newer
# docker run --rm -it megatron_orz:cpu                     # a shell; then: make demo
# docker run --rm -it --gpus all --shm-size 16g megatron_orz:cuda

# The packages of Debian and Ubuntu are those of the image's release, whatever their versions: hadolint ignores DL3008.
# hadolint global ignore=DL3008

FROM python:3.11.14-slim-bookworm AS cpu

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git libnuma1 make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 orz \
    && install --directory --owner orz /megatron_orz

USER 1000
WORKDIR /megatron_orz
ENV PATH=/megatron_orz/.venv/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

# The packages are a layer of their own: a change of the code does not install them again.
COPY --chown=orz Makefile requirements-cpu.lock ./
RUN make requirements

COPY --chown=orz . .
RUN make setup

CMD ["bash"]


FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04 AS cuda

# Ubuntu's images have a user of their own with the first id.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git libnuma1 make python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1001 orz \
    && install --directory --owner orz /megatron_orz

USER 1001
WORKDIR /megatron_orz
ENV PATH=/megatron_orz/.venv/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 \
    CUDA_HOME=/usr/local/cuda TORCH_CUDA_ARCH_LIST=9.0

COPY --chown=orz requirements-cuda.lock ./
RUN python3.12 -m venv .venv \
    && grep --invert-match '^transformer-engine-torch==' requirements-cuda.lock > /tmp/wheels.txt \
    && pip install --no-deps --only-binary :all: --requirement /tmp/wheels.txt \
    && rm /tmp/wheels.txt

# TransformerEngine's torch part has no wheels: it is compiled against the torch above.
RUN NVTE_FRAMEWORK=pytorch MAX_JOBS=4 pip install --no-deps --no-build-isolation \
    "$(grep '^transformer-engine-torch==' requirements-cuda.lock)"

COPY --chown=orz . .
RUN pip install --no-deps --no-build-isolation --editable .

CMD ["bash"]
