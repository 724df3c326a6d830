# The tester: `docker build -t twoclocks .`; docker-compose.yml runs it. Its user owns nothing and its root can be read-only.
FROM python:3.11.14-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY deploy/tester.lock ./
RUN python3 -m venv --without-pip /opt/twoclocks
RUN python3 -m pip --python /opt/twoclocks install --no-cache-dir --require-hashes --only-binary :all: --requirement tester.lock
COPY pyproject.toml setup.py README.md LICENSE ./
COPY twoclocks twoclocks
RUN python3 -m pip --python /opt/twoclocks install --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.11.14-slim-bookworm
COPY --from=build /opt/twoclocks /opt/twoclocks
WORKDIR /app
COPY load_test.py deploy/tester.sh ./
COPY configs configs
COPY requests requests
RUN mkdir output
# all that is written outside ./output goes to /tmp, which can be a tmpfs
ENV PATH=/opt/twoclocks/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp \
    MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TWOCLOCKS_EXPERIMENT=configs/compose.yaml
USER 1000:1000
EXPOSE 8089 9646 4317 4318
ENTRYPOINT ["/app/tester.sh"]
CMD ["--headless"]
