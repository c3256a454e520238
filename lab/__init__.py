"""The platform on one Linux machine: a stand-in for the AWS account, so that the real site.yml can be seen at work."""
