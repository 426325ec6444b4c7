"""The method in plain torch: layouts, scores, selections, predictors, bypass and plans. No Hugging Face here."""
