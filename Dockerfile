# ddae in a container. torch and DALI bring CUDA's libraries, so that the base image needs none.
#
#   docker build --tag ddae .                       for drivers from 580 on (CUDA 13)
#   docker build --tag ddae --build-arg CUDA=cu12 . for older drivers
#   docker run --gpus all --shm-size 8g --volume "$PWD:/work" ddae pretrain PHOTOS --out runs/mine
FROM debian:bookworm-slim
ARG CUDA=cu13
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates g++ git make openssh-client pdsh python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/ddae
# The environment first: it is built again only if the dependencies change.
COPY Makefile pyproject.toml README.md LICENSE constraints*.txt ./
COPY ddae/__init__.py ddae/__init__.py
COPY kernels/ddae_kernels/__init__.py kernels/ddae_kernels/__init__.py
RUN make venv CUDA=${CUDA} && rm -rf /root/.cache
COPY . .
ENV PATH=/opt/ddae/.venv/bin:$PATH
WORKDIR /work
ENTRYPOINT ["ddae"]
CMD ["--help"]
