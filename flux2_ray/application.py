"""The Serve application: ``flux2_ray.application:application``, as ``serve.yaml`` names it.

How many replicas there are, and on what, is said in the configuration file; what a service needs to know is said in the
same variables as everywhere, which the machines' Ray processes must have in their environment.
"""

from ray import serve

from flux2_ray import ingress
from flux2_ray.encoder import EncoderReplica
from flux2_ray.generator import GeneratorReplica

encoder = serve.deployment(EncoderReplica, name=ingress.ENCODER).bind()
generator = serve.deployment(GeneratorReplica, name=ingress.GENERATOR).bind(encoder)
application = serve.deployment(serve.ingress(ingress.create_app)(), name=ingress.INGRESS).bind(encoder, generator)
