"""Networks that learn solution operators in the frequency domain, and the baselines that they were compared with.

Poli, Massaroli, Berto, Park, Dao, Re, Ermon: "Transform Once: Efficient Operator Learning in Frequency Domain", NeurIPS
2022, arXiv 2211.14453. The layers stand in `convatlas.nn.t1_layer` and `convatlas.nn.transform_conv`.
"""
