# docker build --tag megatron_orz . && docker run --rm -it megatron_orz
FROM python:3.11-slim AS cpu

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /megatron_orz

# The packages are a layer of their own: a change of the code does not install them again.
COPY Makefile requirements-cpu.lock ./
RUN make requirements

COPY . .
RUN make setup

CMD ["make", "demo"]
