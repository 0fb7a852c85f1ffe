module github.com/umbp/umbp

go 1.26.0
