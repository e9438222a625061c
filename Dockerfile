# The benches in a container:
#   docker build -t lowbit .
#   docker run --rm --gpus all lowbit                                # pytest benches
#   docker run --rm --gpus all -v "$PWD/benches/baselines:/lowbit/benches/baselines" lowbit benches --benchmark-compare
# docs/cloud.md has the volumes worth mounting, and notes for rented GPUs.
#
# CUDA's runtime image of the smallest flavour: torch's wheels bring cuBLAS, cuDNN and NCCL themselves, at the versions
# that they were built with. The flavour "runtime" would add 2 GB of others, which nothing loads.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# Inductor and Triton compile C++ and C at run time, against Python's headers. The base image's release is pinned; of a
# package the archive keeps only the newest build, so a pin here would break the next build and fix nothing.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# USER and HOME: torch asks for both, and a foreign --user has no entry in /etc/passwd.
ENV VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/home/lowbit \
    USER=lowbit

# The layers of libraries change with the pins alone, not with the code. torch first and alone, as in tox.ini.
COPY .ci/constraints.txt /tmp/constraints.txt
RUN python3 -m venv "$VIRTUAL_ENV" && pip install --constraint /tmp/constraints.txt torch
RUN pip install --requirement /tmp/constraints.txt

# 1000 is the first user of most hosts, who then owns what is written to mounted folders; the base image's own, ubuntu,
# gives it up. Another host user runs it with --user "$(id -u)", so home and checkout are everybody's to write.
RUN userdel --remove ubuntu && useradd --uid 1000 --home-dir "$HOME" --create-home lowbit && chmod a+rwx "$HOME"

WORKDIR /lowbit
COPY . .
RUN pip install --constraint /tmp/constraints.txt --no-deps --editable . && chmod --recursive a+rwX /lowbit
USER 1000:1000

# The commit that is measured, for the header of kept runs: docker build --build-arg LOWBIT_COMMIT="$(git rev-parse HEAD)"
ARG LOWBIT_COMMIT=""
ENV LOWBIT_COMMIT=$LOWBIT_COMMIT
LABEL org.opencontainers.image.revision=$LOWBIT_COMMIT

# Once, while the session still loads: a second process would disturb the timings. For a run that is gated, leave it out
# with docker run --no-healthcheck.
HEALTHCHECK --interval=24h --start-period=5m --start-interval=5s --timeout=2m CMD ["python", "-m", "lowbit", "formats"]

ENTRYPOINT ["pytest"]
CMD ["benches"]
