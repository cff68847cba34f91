"""The Serve application: ``flux2_ray.application:application``, as ``serve.yaml`` names it.

The configuration file defines the number of replicas and their resources. The services are configured by the same
environment variables as without Ray, which must be set for the Ray processes of all machines.
"""

from ray import serve

from flux2_ray import ingress
from flux2_ray.encoder import EncoderReplica
from flux2_ray.generator import GeneratorReplica

encoder = serve.deployment(EncoderReplica, name=ingress.ENCODER).bind()
generator = serve.deployment(GeneratorReplica, name=ingress.GENERATOR).bind(encoder)
application = serve.deployment(serve.ingress(ingress.create_app)(), name=ingress.INGRESS).bind(encoder, generator)
