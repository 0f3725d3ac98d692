//! Real CRIUs, real processes and two hosts on one machine.
