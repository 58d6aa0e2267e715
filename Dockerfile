# The trainer in a container: README, "Docker". What can be started in it: scripts/container.txt.
#
#   docker build -t pskd .                              for CUDA 13, and for CPUs
#   docker build -t pskd --build-arg PSKD_CUDA=cu12 .   with DALI for CUDA 12 (and torch for 13)
#
# BASE_IMAGE: of Debian's family, with Python 3.11 or newer, its headers and the module venv.
# Package indexes, proxies and certificates of a site come from the environment of the build
# (`docker build --secret`, `buildah build --volume`), and none of them stays in the image.
ARG BASE_IMAGE=python:3.11-slim
FROM ${BASE_IMAGE}

# tini is process 1: it passes signals on, and waits for orphans. g++ is for --engine.compile true;
# without that, training compiles nothing.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ tini \
    && rm -rf /var/lib/apt/lists/*

# Dependencies before the code: a change of the code does not install them again.
ARG PSKD_CUDA=cu13
ENV PATH=/opt/venv/bin:$PATH PSKD_BIN=/opt/venv/bin
WORKDIR /opt/pskd
COPY pyproject.toml requirements.lock ./
RUN python3 -m venv /opt/venv \
    && python -c "import tomllib; t = tomllib.load(open('pyproject.toml', 'rb')); p = t['project']; \
print(*t['build-system']['requires'], *p['dependencies'], \
*p['optional-dependencies']['$PSKD_CUDA'], *p['optional-dependencies']['report'], sep='\n')" > /tmp/requirements.txt \
    && pip install --no-cache-dir --constraint requirements.lock -r /tmp/requirements.txt \
    && rm /tmp/requirements.txt

COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && python -m compileall -q pskd

# Any user may train (docker run --user): HOME holds caches, /data and /runs are mounted.
RUN useradd --uid 1000 --no-create-home --home-dir /home/pskd pskd \
    && install -d -m 1777 -o pskd -g pskd /home/pskd /data /runs \
    && ln -s /data data \
    && ln -s /runs runs
ENV HOME=/home/pskd USER=pskd PSKD_RUN_DIR=/runs/run
USER pskd

# A run that was killed has an old heartbeat until it has been resumed, hence the start period.
HEALTHCHECK --interval=30s --timeout=30s --start-period=15m CMD ["pskd", "health"]
ENTRYPOINT ["tini", "-s", "--"]
CMD ["cat", "scripts/container.txt"]
