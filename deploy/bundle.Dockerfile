# One image with its model, for services that run an image and nothing else. The folder of the bundle is the context:
#   docker build -f deploy/bundle.Dockerfile -t clot-model:0.1.0 runs/RUN/bundle
ARG SERVER=strip-notebooks:0.1.0
FROM ${SERVER}
COPY --chown=0:0 . /bundle/
